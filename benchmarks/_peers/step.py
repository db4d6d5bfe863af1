"""A training step of the transformer with one library, in a process that takes turns with those of other libraries.

It prints the compiled costs as a line of JSON, then the seconds of a step for each line that it reads, and at the end
its peak memory in bytes.
"""

import argparse
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _measure, _transformer
from benchmarks._peers import forms, layered, tries
from benchmarks._peers.forms import DENSE, Form, Spec
from benchmarks._peers.layered import Layer
from tests.support.programs import PROGRAMS
from tests.support.weight_uses import Kind

OPTIMISER = optax.adamw(1e-3)


def by_hand(spec: Spec, w: Any, x: Any) -> Layer:
    """A dense layer with its factors, the leading axes of the low-rank products flattened into one."""
    shapes = {"a": (w.shape[0], tries.RANK), "b": (tries.RANK, w.shape[1])}

    def apply(w: jax.Array, factors: Any, x: jax.Array) -> jax.Array:
        low_rank = (x.reshape(-1, x.shape[-1]) @ factors["a"]) @ factors["b"]
        return x @ w + tries.ALPHA / tries.RANK * low_rank.reshape(*x.shape[:-1], -1)

    factors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return Layer(factors, apply, lambda factors: tries.ALPHA / tries.RANK * factors["a"] @ factors["b"])


class _Weight:
    """A weight with its name, as the model hands it to the product."""

    def __init__(self, name: str, w: Any) -> None:
        self.name, self.w = name, w


def transformer(sizes: _transformer.Sizes) -> tuple[Kind, dict[str, Any]]:
    """The transformer as a kind of weight on its own, and its parameters by path; its form is written with layers."""
    params = _transformer.init(jax.random.key(0), sizes)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves]
    adapted = {path for path in paths if path.rsplit("_", 1)[-1] in _transformer.KERNELS}

    def use(p: Any, x: Any) -> jax.Array:
        return _transformer.unrolled(
            jax.tree.unflatten(treedef, [p[path] for path in paths]), x["x"], heads=sizes.heads
        )

    def form(call: Any, p: Any, factors: Any, x: jax.Array) -> jax.Array:
        named = [_Weight(path, p[path]) if path in adapted else p[path] for path in paths]
        product = lambda y, weight: call(weight.name, DENSE, weight.w, y)  # noqa: E731
        return _transformer.unrolled(jax.tree.unflatten(treedef, named), x, heads=sizes.heads, product=product)

    forms.FORMS["transformer"] = Form(form)
    arrays = dict(zip(paths, (leaf for _, leaf in leaves), strict=True))
    return Kind("transformer", {path: arrays[path].shape for path in adapted}, {}, {}, use), arrays


def trained(library: str, kind: Kind, params: Any, x: Any) -> tuple[Callable[..., jax.Array], Any]:
    """`logits(trained, params, x)` and what is trained, no factor zero."""
    if library == "full":
        return lambda trained, _, x: kind.use(trained, x), params
    module = None if library == "by_hand" else importlib.import_module(f"benchmarks._peers.{library}")
    attempt = layered.attempts(by_hand) if module is None else module.attempt
    made = attempt(kind, PROGRAMS[0], params, x)
    leaves, treedef = jax.tree.flatten(made.adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    values = [0.01 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return lambda trained, params, x: made.side(params, trained, x), jax.tree.unflatten(treedef, values)


def compiled(library: str, sizes: _transformer.Sizes, batch: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The step, and what the compiler says of it."""
    kind, params = transformer(sizes)
    x = {"x": jax.random.randint(jax.random.key(2), (batch, sizes.length), 0, sizes.vocabulary)}
    logits, adapter = trained(library, kind, params, x)

    def loss(adapter: Any, params: Any, x: Any) -> jax.Array:
        targets = jnp.roll(x["x"], -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits(adapter, params, x), targets).mean()

    def step(adapter: Any, state: Any, params: Any, x: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(adapter, params, x)
        updates, state = OPTIMISER.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    frozen = {} if library == "full" else params
    args = (adapter, OPTIMISER.init(adapter), frozen, x)
    start = time.perf_counter()
    program = _measure.compile(step, *args)
    return program.run, {
        "flops": program.flops,
        "temp_bytes": program.temp_bytes,
        "compile_seconds": program.compile_seconds,
        "lower_seconds": time.perf_counter() - start - program.compile_seconds,
        "trained": sum(leaf.size for leaf in jax.tree.leaves(adapter)),
        "loss": float(program.run()[-1]),
    }


def torch_step(sizes: _transformer.Sizes, batch: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The step of PEFT with torch."""
    peft_costs = importlib.import_module("benchmarks.peft_costs")
    torch = peft_costs.torch
    tokens = torch.randint(sizes.vocabulary, (batch, sizes.length))
    run, count = peft_costs.step("LoRA", sizes, tokens)
    return run, {"trained": count, "loss": run()}


def main() -> None:
    """Reads the library and the sizes, compiles, and takes turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    for name in ("layers", "width", "length", "batch", "rank", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    tries.RANK, tries.ALPHA = options.rank, 2.0 * options.rank
    sizes = _transformer.Sizes(
        layers=options.layers,
        width=options.width,
        hidden=4 * options.width,
        heads=max(1, options.width // 64),
        vocabulary=options.vocabulary,
        length=options.length,
    )
    make = torch_step if options.library == "torch" else lambda *args: compiled(options.library, *args)
    run, row = make(sizes, options.batch)
    print(json.dumps(row), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(run())
        print(time.perf_counter() - start, flush=True)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)


if __name__ == "__main__":
    main()
