"""Adapters that jlora saves for PEFT, each for a model of `peft_models.py`."""

from __future__ import annotations

import dataclasses
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from tests.support.peft_models import MODELS, State

LORA = jlora.LoRA(3, 5.0)


@dataclasses.dataclass(frozen=True)
class Export:
    """An adapter: its model, the method of every path that a pattern matches, and what it is saved for.

    Arguments:
        model: its name in `MODELS`.
        targets: the methods.
        target: as for `jlora.peft.save`.
        rows: of embeddings under `Full`, those that are trained.
        scale: by which the adapter is scaled.
    """

    model: str
    targets: dict[str, jlora.Method]
    target: str | None = None
    rows: tuple[int, ...] | None = None
    scale: float = 1.0


ATTENTION = ".*/(query|value)/kernel"
EXPORTS: dict[str, Export] = {
    "lora": Export("bert", {ATTENTION: LORA, ".*/down/kernel": jlora.LoRA(2)}),
    "stabilized": Export("bert", {ATTENTION: jlora.LoRA(4, 3.0, rank_stabilized=True)}),
    "overlapping": Export("bert", {"layer_1/.*/query/kernel": jlora.LoRA(2, 7.0), ".*/(query|out)/kernel": LORA}),
    "embedding": Export("bert", {"(word|position)_embedding/.*": LORA, ATTENTION: LORA}),
    "dora": Export("bert", {"word.*": jlora.DoRA(2, 3.0), ATTENTION: jlora.DoRA(2, 3.0)}),
    "bias_beside": Export("bert", {ATTENTION: LORA, ".*/(query|value)/bias": jlora.Full()}),
    "bias_all": Export("bert", {ATTENTION: LORA, ".*/bias": jlora.Full()}),
    "modules": Export("bert", {ATTENTION: LORA, ".*/up/.*": jlora.Full(), ".*_norm/.*": jlora.Full()}),
    "loha": Export("bert", {ATTENTION: jlora.LoHa(2, 3.0), ".*/up/kernel": jlora.LoHa(3, 3.0)}),
    "lokr": Export("bert", {".*/up/kernel": jlora.LoKr(1, 3.0)}),
    "lokr_both": Export("bert", {".*/down/kernel": jlora.LoKr(1, 3.0, 8, True)}),
    "lokr_whole": Export("bert", {".*/down/kernel": jlora.LoKr(None)}, scale=0.5),
    "vera": Export("bert", {ATTENTION: jlora.VeRA(4, seed=3), ".*/down/kernel": jlora.VeRA(4, seed=3)}),
    "ia3_in": Export("bert", {".*/down/kernel": jlora.IA3("in")}),
    "ia3": Export("llama", {".*/(key|value)/kernel": jlora.IA3(), ".*/down/kernel": jlora.IA3("in")}, scale=0.5),
    "additive": Export("bert", {".*/up/kernel": jlora.Additive(2, 3.0), ATTENTION: LORA}),
    "offset": Export("bert", {ATTENTION: jlora.LoRA(2, 3.0, start="gaussian", offset=True)}),
    "adalora": Export("bert", {ATTENTION: jlora.AdaLoRA(3, 5.0)}),
    "conv1d": Export("gpt2", {".*/(query|key|value|up)/kernel": LORA}),
    "conv1d_part": Export("gpt2", {".*/(query|value)/kernel": LORA, ".*/query/bias": jlora.Full()}),
    "conv1d_dora": Export("gpt2", {".*/(up|down)/kernel": jlora.DoRA(3, 5.0)}),
    "decoder": Export("llama", {".*/kernel": LORA}),
    "stack": Export("llama_scanned", {"layers/.*/kernel": LORA}),
    "stack_norms": Export("llama_scanned", {"layers/.*/query/kernel": LORA, ".*/scale": jlora.Full()}, scale=0.5),
    "stack_dora": Export("llama_scanned", {"layers/.*/(out|gate)/kernel": jlora.DoRA(2, 3.0)}, scale=0.5),
    "stack_vera": Export("llama_scanned", {"layers/.*/(query|down)/kernel": jlora.VeRA(4)}, scale=0.5),
    "stack_loha": Export("llama_scanned", {"layers/.*/(query|down)/kernel": jlora.LoHa(2)}, scale=0.5),
    "fused": Export("llama_fused", {".*/gate_up/kernel": LORA, ".*/down/kernel": LORA}),
    "groups": Export(
        "llama_fused", {".*/gate_up/kernel": jlora.GroupedLoRA(2, 3.0, groups=2), ".*/down/kernel": jlora.LoRA(2, 3.0)}
    ),
    "one_group": Export(
        "llama_fused", {".*/gate_up/kernel": jlora.GroupedLoRA(2, 3.0, groups=2, enable=(False, True))}
    ),
    "tokens": Export("llama", {".*/query/kernel": LORA, "embed/.*": jlora.Full()}, rows=(1, 5, 7)),
    "tokens_alone": Export("llama", {"embed/.*": jlora.Full()}, rows=(2, 9)),
    "tokens_tied": Export("llama_tied", {".*/query/kernel": LORA, "embed/.*": jlora.Full()}, rows=(2, 9)),
    "head": Export("llama", {".*/query/kernel": LORA, "head/kernel": jlora.Full()}),
    "untied": Export("llama", {".*/query/kernel": LORA, "embed/.*": LORA, "head/kernel": LORA}),
    "tied": Export("llama_tied", {".*/query/kernel": LORA, "embed/.*": LORA}),
    "experts": Export("mixtral", {".*/(gate_up|down)/kernel": LORA, ".*/query/kernel": jlora.LoRA(2)}),
    "stacked_experts": Export("mixtral_scanned", {".*/down/kernel": LORA, ".*/gate_up/kernel": jlora.LoRA(2)}),
    "convolution": Export("cnn", {".*/kernel": LORA}),
    "convolution_dora": Export("cnn", {".*/kernel": jlora.DoRA(2, 3.0)}),
    "convolution_loha": Export("cnn", {"(first|second)/kernel": jlora.LoHa(2, 3.0)}),
    "convolution_lokr": Export("cnn", {".*/kernel": jlora.LoKr(1, 3.0)}),
    "convolution_lokr_whole": Export(
        "cnn", {"(first|second)/kernel": jlora.LoKr(None, decompose_both=True)}, scale=0.5
    ),
    "convolution_additive": Export("cnn", {"second/kernel": jlora.Additive(1, 3.0)}),
    "vllm": Export("llama", {".*/query/kernel": jlora.LoRA(2, 3.0), ".*/(up|down)/kernel": LORA}, target="vllm"),
}


def program(model: str, state: State) -> tuple[Any, jlora.Sites]:
    """A model's parameters and sites."""
    entry = MODELS[model]
    params = jax.tree.map(jnp.asarray, entry.params(state))
    return params, jlora.trace(entry.apply, params, example(entry.torch))


def example(torch: str) -> jax.Array:
    rng = np.random.RandomState(1)
    return jnp.ones((2, 3, 6, 6)) if torch == "cnn" else jnp.asarray(rng.randint(0, 30, (2, 6)), jnp.int32)


def adapter(name: str, sites: jlora.Sites) -> dict[str, jlora.Update]:
    """The adapter of an export, all its numbers at random."""
    export = EXPORTS[name]
    exported = jlora.init(jax.random.key(0), sites, export.targets)

    def draw(path: str, factor: str, array: jax.Array) -> jax.Array:
        rng = np.random.RandomState(zlib.crc32(f"{name} {path} {factor}".encode()))
        new = np.asarray(0.3 * rng.normal(size=array.shape), np.float32)
        if export.rows is not None and re.fullmatch(".*embedding", path):
            new[[k for k in range(len(new)) if k not in export.rows]] = 0
        return jnp.asarray(new)

    def drawn(path: str, update: jlora.Update) -> jlora.Update:
        factors = {name: draw(path, name, array) for name, array in update.factors.items()}
        frozen = {name: draw(path, name, array) for name, array in update.frozen.items()}
        initial = {name: draw(path, f"{name}_at_start", array) for name, array in update.initial.items()}
        return dataclasses.replace(update, factors=factors, frozen=frozen, initial=initial)

    return jlora.scale({path: drawn(path, update) for path, update in exported.items()}, export.scale)


def save(name: str, folder: Path, params: Any, sites: jlora.Sites) -> None:
    export = EXPORTS[name]
    exported = adapter(name, sites)
    jlora.peft.save(folder, exported, MODELS[export.model].names, params=params, target=export.target)
