"""Adapts a small mixture of experts to film reviews: experts, router and attention, by LoRA, DoRA and shared LoRA.

python examples/train_experts.py                        # three methods, ragged dispatch
python examples/train_experts.py --method lora --dispatch dense
python examples/train_experts.py --tiny                 # a small model and random texts; no download

The base model is trained on other genres: editorials, tweets and product reviews. Then the base is frozen, and each
method trains an adapter on film reviews. The program shows what every expert got and how far it moved. It saves the
adapter, exports it in the layouts that PEFT and serving engines read, loads it back, and merges it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import assets
import experts_report
import jlora
import train_many
import training
from finetune_reviews import unused
from jlora.peft import Module, Names
from moe import MixtureOfExperts
from report import bytes_on_disk, environment
from reviews import Split

# Stated for the dense dispatch: its einsum of all experts on all tokens does not show that the first axis is a stack.
ROLES: dict[str, Any] = {"layers/.*/experts/(up|down)": ("stack", "in", "out")}

_LAYER = "model.layers.{i}"
_OUTSIDE: dict[str, str | Module] = {
    "layers/{i}/attention/query": f"{_LAYER}.self_attn.q_proj",
    "layers/{i}/attention/key": f"{_LAYER}.self_attn.k_proj",
    "layers/{i}/attention/value": f"{_LAYER}.self_attn.v_proj",
    "layers/{i}/attention/out": f"{_LAYER}.self_attn.o_proj",
    "layers/{i}/router": f"{_LAYER}.mlp.gate",
}
_MODULES: Names = _OUTSIDE | {
    f"layers/{{i}}/experts/{k}": f"{_LAYER}.mlp.experts.{{e}}.{k}_proj" for k in ("up", "down")
}
_PARAMETERS: Names = _OUTSIDE | {
    f"layers/{{i}}/experts/{k}": Module(f"{_LAYER}.mlp.experts.{k}_proj", "parameter") for k in ("up", "down")
}
# The layouts of experts in files: the names, and the target of `jlora.peft.save`.
LAYOUTS: dict[str, tuple[Names, str | None]] = {
    "PEFT, target_parameters": (_PARAMETERS, None),
    "PEFT, a module for each expert": (_MODULES, None),
    "vLLM, a module for each expert": (_MODULES, "vllm"),
}


@dataclass(frozen=True)
class Job:
    """A model and its texts: of other genres for the base, and film reviews to adapt it to."""

    model: MixtureOfExperts
    others: Split
    train: Split
    test: Split


def load(dispatch: str) -> Job:
    """The texts of the four genres; the splits do not depend on the seed of a run."""
    folder, sentences = assets.minilm(), assets.genres()
    texts = {g: train_many.read(sentences / f, folder / "tokenizer.json") for g, f in train_many.FILES.items()}
    films = texts.pop("film reviews")
    others = Split(*(np.concatenate(parts) for parts in zip(*texts.values(), strict=True)))
    model = MixtureOfExperts(1 + int(max(others.ids.max(), films.ids.max())), train_many.LENGTH, dispatch=dispatch)
    return Job(model, others, *_halves(films, train_many.TRAIN))


def tiny(dispatch: str) -> Job:
    """A small model and random texts; the first bit of all tokens is the label, and in other genres the second."""
    rng = np.random.default_rng(0)
    model = MixtureOfExperts(16, 16, width=16, hidden=8, layers=2, heads=2, experts=4, dispatch=dispatch)

    def texts(bit: int) -> Split:
        ids, labels = rng.integers(0, 16, (96, 16)), rng.integers(0, 2, 96)
        mask = np.arange(16) < rng.integers(6, 17, 96)[:, None]
        ids = ids & ~(1 << bit) | labels[:, None] << bit
        return Split(*(array.astype(np.int32) for array in (ids, mask, labels)))

    return Job(model, texts(1), *_halves(texts(0), 64))


def _halves(texts: Split, count: int) -> tuple[Split, Split]:
    return Split(*(array[:count] for array in texts)), Split(*(array[count:] for array in texts))


def targets_of(method: str, rank: int) -> dict[str, jlora.Method]:
    """What is adapted: attention, router and experts. Experts of "shared" have the outer factors in common.

    The kernels that read the hidden state share A, and those that write it share B.
    """
    alpha = 2.0 * rank
    if method == "shared":
        return {
            "layers/.*/(attention/.*|router)": jlora.LoRA(rank, alpha),
            "layers/.*/experts/up": jlora.SharedLoRA(rank, alpha),
            "layers/.*/experts/down": jlora.SharedLoRA(rank, alpha, shared="b"),
        }
    return {"layers/.*": jlora.DoRA(rank, alpha) if method == "dora" else jlora.LoRA(rank, alpha)}


def adapt(job: Job, params: Any, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains an adapter, evaluates it, and takes it through files and a merge."""
    example = (job.train.ids[:1], job.train.mask[:1])
    sites = jlora.trace(job.model.logits, params, *example, roles=ROLES)
    adapter = jlora.init(jax.random.key(options.seed), sites, targets_of(method, options.rank), params=params)
    adapted = jlora.adapt(job.model.logits)
    adapter, history = training.fit(
        lambda adapter, params, ids, mask: adapted(params, adapter, ids, mask),
        adapter,
        params,
        job.train,
        None,
        name=method,
        learning_rate=options.lr,
        steps=options.steps,
        seed=options.seed,
    )
    folder = options.out / method
    jlora.save(folder / "adapter", adapter, params=params)
    loaded = jlora.load(folder / "adapter", params=params)
    merged = jlora.merge(params, loaded)
    logits = predict(job.model, params, job.test, adapter)
    tokens, moved = count_tokens(job.model, params, job.train, adapter), movement(params, merged)
    batch = (job.train.ids[:32], job.train.mask[:32])
    explained = jlora.explain(job.model.logits, params, adapter, *batch)
    other = dataclasses.replace(job.model, dispatch="dense" if job.model.dispatch == "ragged" else "ragged")
    return {
        "accuracy": training.accuracy(logits, job.test.labels),
        "losses": np.round(history.losses, 4).tolist(),
        "tokens": tokens.tolist(),
        "moved": moved.tolist(),
        "moves with its tokens": bool(((moved > 1e-6) == (tokens > 0)).all()),
        "trained numbers": sum(a.size for a in jax.tree.leaves([update.factors for update in adapter.values()])),
        "bytes": bytes_on_disk(folder / "adapter"),
        "dense uses": len(explained.dense),
        "added FLOPs": sum(use.added for use in explained.uses) / explained.flops,
        "loaded": largest_difference(adapter, loaded),
        "merged": float(np.abs(predict(job.model, merged, job.test) - logits).max()),
        "other dispatch": float(np.abs(predict(other, params, job.test, adapter) - logits).max()),
        "files": export(folder, adapter, sites, params),
    }


def export(folder: Path, adapter: jlora.Adapter, sites: jlora.Sites, params: Any) -> dict[str, dict[str, Any]]:
    """Writes the adapter in every layout, and reads it back: the difference of all arrays, or why it is refused."""
    files: dict[str, dict[str, Any]] = {}
    expected = {path: update for path, update in adapter.items() if not isinstance(update.method, jlora.SharedLoRA)}
    expected |= jlora.to_lora({path: update for path, update in adapter.items() if path not in expected})[0]
    for number, (layout, (names, target)) in enumerate(LAYOUTS.items()):
        at = folder / f"exported-{number}"
        try:
            changes = jlora.peft.save(at, adapter, names, params=params, target=target)
        except ValueError as reason:
            files[layout] = {"refused": str(reason)}
            continue
        tensors = load_file(at / "adapter_model.safetensors")
        loaded = jlora.peft.load(at, sites, names, params=params)
        files[layout] = {
            "tensors": len(tensors),
            "bytes": bytes_on_disk(at),
            "changes": len(changes),
            "loaded": largest_difference(expected, loaded),
        }
    return files


def largest_difference(one: jlora.Adapter, other: jlora.Adapter) -> float:
    """The largest difference of two adapters in any trained number; infinite if they differ otherwise."""
    if one.keys() != other.keys():
        return math.inf
    pairs = [(one[path].factors, other[path].factors) for path in one]
    if any(a.keys() != b.keys() for a, b in pairs):
        return math.inf
    return max(float(jnp.abs(a[name] - b[name]).max()) for a, b in pairs for name in a)


def predict(model: MixtureOfExperts, params: Any, texts: Split, adapter: jlora.Adapter | None = None) -> np.ndarray:
    """The logits of all texts."""
    run = jax.jit(jlora.adapt(model.logits))
    return training.predict(lambda a, p, ids, mask: run(p, a, ids, mask), adapter or {}, params, texts)


def count_tokens(
    model: MixtureOfExperts, params: Any, texts: Split, adapter: jlora.Adapter | None = None
) -> np.ndarray:
    """The tokens of all texts that each expert gets, (layers, experts)."""
    run = jax.jit(jlora.adapt(model.tokens))
    parts = [slice(start, start + 100) for start in range(0, len(texts.labels), 100)]
    return np.sum([run(params, adapter or {}, texts.ids[part], texts.mask[part]) for part in parts], 0)


def movement(params: Any, merged: Any) -> np.ndarray:
    """How far each expert moved: the norm of its change divided by that of its weights, (layers, experts)."""

    def squares(layers: list[Any]) -> np.ndarray:
        experts = [layer["experts"].values() for layer in layers]
        return np.array([sum(np.square(kernel).sum((1, 2)) for kernel in kernels) for kernels in experts])

    change = jax.tree.map(lambda a, b: a - b, merged["layers"], params["layers"])
    return np.sqrt(squares(change) / squares(params["layers"]))


def run(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Trains the base on other genres, and every adapter on film reviews."""
    base, history = training.fit(
        lambda params, _, ids, mask: job.model.logits(params, ids, mask),
        job.model.init(jax.random.key(options.seed)),
        None,
        job.others,
        None,
        name="base",
        learning_rate=2e-3,
        steps=options.base_steps,
        seed=options.seed,
    )
    return {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "base": {
            "accuracy": training.accuracy(predict(job.model, base, job.test), job.test.labels),
            "losses": np.round(history.losses, 4).tolist(),
            "tokens": count_tokens(job.model, base, job.train).tolist(),
            "numbers": sum(a.size for a in jax.tree.leaves(base)),
        },
        "methods": {method: adapt(job, base, method, options) for method in options.method},
    }


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    methods = ("lora", "dora", "shared")
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, help="(default: all three)")
    parser.add_argument("--dispatch", choices=("ragged", "dense"), default="ragged", help="(default: ragged)")
    parser.add_argument("--rank", type=int, default=4, help="of all updates; the scale is always 2 (default: 4)")
    parser.add_argument("--steps", type=int, default=200, help="of 32 film reviews (default: 200)")
    parser.add_argument("--base-steps", type=int, default=400, help="of 32 texts of other genres (default: 400)")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of adapters (default: 5e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, adapters and data order (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="a small model and random texts; no download")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: the first unused of runs/experts, ...)")
    options = parser.parse_args(args)
    options.out = options.out or unused("runs/experts")
    return options


def main() -> int:
    """Runs everything, and writes the table and the picture."""
    options = arguments()
    try:
        job = (tiny if options.tiny else load)(options.dispatch)
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = run(job, options)
    options.out.mkdir(parents=True, exist_ok=True)
    result["environment"] = environment()
    (options.out / "results.json").write_text(json.dumps(result) + "\n")
    print(experts_report.write(options.out, result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
