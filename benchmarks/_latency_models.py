"""The two models of the latency table in all forms, with random weights.

MiniLM-L6 is an encoder. Of SmolLM2-135M a form is one step of decoding with a cache of keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora
import minilm
import smollm
from benchmarks import _adapter_layers

RANK = 8
TARGETS = r"(.*/)?(query|value)/kernel(/value)?"
# Name of the form: kind of adapter layer and size of the bottleneck.
ADAPTERS = {"Adapter-L, 64": ("L", 64), "Adapter-H, 16": ("H", 16), "Adapter-H, 64": ("H", 64)}
BASE, MERGED, UNMERGED = "base", "LoRA, merged", "LoRA, not merged"
FORMS = (BASE, MERGED, UNMERGED, *ADAPTERS)


@dataclass(frozen=True)
class Form:
    """A model in one form.

    Arguments:
        function: of `params` and of the inputs of a cell.
        params: its first arguments.
        added: the numbers that the form adds to the model.
    """

    function: Callable[..., Any]
    params: tuple[Any, ...]
    added: int = 0


@dataclass(frozen=True)
class Model:
    """A model in all forms.

    Arguments:
        name: of the rows.
        forms: by name.
        inputs: the inputs of a batch and a length.
        donated: whether the inputs are given to the program, which returns the next ones: the cache of a decoder.
    """

    name: str
    forms: dict[str, Form]
    inputs: Callable[[int, int], tuple[Any, ...]]
    donated: bool


def random_like(tree: Any, seed: int) -> Any:
    """Random arrays of the shapes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.1 * rng.standard_normal(a.shape, np.float32)), tree)


def count(tree: Any) -> int:
    """The numbers in a tree."""
    return sum(a.size for a in jax.tree.leaves(tree))


def lora_forms(function: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> dict[str, Form]:
    """The base, and LoRA merged and not merged; no factor is zero."""
    sites = jlora.trace(function, params, *inputs)
    adapter = random_like(jlora.init(jax.random.key(1), sites, {TARGETS: jlora.LoRA(RANK)}), 1)
    return {
        BASE: Form(function, (params,)),
        MERGED: Form(function, (jlora.merge(params, adapter),)),
        UNMERGED: Form(jlora.adapt(function), (params, adapter), count(adapter)),
    }


def encoder(model: minilm.MiniLM) -> Model:
    """The encoder: token ids (batch, length) to embeddings."""

    def inputs(batch: int, length: int) -> tuple[Any, ...]:
        ids = jax.random.randint(jax.random.key(0), (batch, length), 0, model.vocabulary)
        return ids, jnp.ones((batch, length), jnp.int32)

    params = random_like(jax.eval_shape(model.init, jax.random.key(0), *inputs(1, 2)), 0)
    forms = lora_forms(model.apply, params, inputs(1, 2))
    function = _adapter_layers.in_linen(model.apply)
    for name, (kind, size) in ADAPTERS.items():
        paths = _adapter_layers.paths_in_linen(model.layers, kind)
        layers = {path: _adapter_layers.new_layer(jax.random.key(2), model.width, size) for path in paths}
        forms[name] = Form(function, (params, layers), count(layers))
    return Model("MiniLM-L6, a batch", forms, inputs, donated=False)


def decoder(config: smollm.Config) -> Model:
    """A step of decoding at the last position of a cache: a token (batch, 1) to logits and the next cache."""

    def inputs(batch: int, length: int) -> tuple[Any, ...]:
        cache = smollm.empty_cache(config, batch, length)
        return jnp.full((batch, 1), 7, jnp.int32), cache, jnp.int32(length - 1)

    def step(graph: Any) -> Callable[..., Any]:
        forward = smollm.forward(graph)

        def run(params: Any, token: jax.Array, cache: Any, position: jax.Array) -> Any:
            logits, cache = forward(params, token, cache, position)
            return logits[:, -1].argmax(-1, keepdims=True).astype(token.dtype), cache, position

        return run

    graph, shapes = nnx.split(nnx.eval_shape(lambda: smollm.SmolLM(config, nnx.Rngs(0))))
    params = random_like(shapes, 0)
    forms = lora_forms(step(graph), params, inputs(1, 2))
    for name, (kind, size) in ADAPTERS.items():
        model = nnx.merge(graph, params, copy=True)
        _adapter_layers.put_into_nnx(model, kind, size, jax.random.key(2))
        adapted, extended = nnx.split(model)
        forms[name] = Form(step(adapted), (extended,), count(extended) - count(params))
    return Model("SmolLM2-135M, one token", forms, inputs, donated=True)


def encoder_of(vocabulary: int, positions: int, width: int, layers: int, heads: int, hidden: int) -> Model:
    """An encoder of some sizes."""
    return encoder(minilm.MiniLM(vocabulary, positions, 2, width, layers, heads, hidden, 1e-12))


FULL: dict[str, Callable[[], Model]] = {
    "encoder": lambda: encoder_of(vocabulary=30522, positions=512, width=384, layers=6, heads=12, hidden=1536),
    "decoder": lambda: decoder(smollm.Config(49152, 576, 1536, 30, 9, 3, 1e-5, 1e5)),
}
SMALL: dict[str, Callable[[], Model]] = {
    "encoder": lambda: encoder_of(vocabulary=64, positions=32, width=32, layers=2, heads=4, hidden=64),
    "decoder": lambda: decoder(smollm.Config(64, 24, 48, 3, 6, 2, 1e-5, 100.0)),
}
