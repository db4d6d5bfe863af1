"""A training step of the transformer with one library, in a process that takes turns with those of other libraries.

It imports the library and prints a line. It reads a line, compiles, and prints the compiled costs as JSON. For each
number that it reads then, it runs so many steps and prints the seconds of one. When its input ends, it prints the peak
of its memory, and the losses that tell whether it did the same work as the others.
"""

import argparse
import functools
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _measure, _transformer
from benchmarks._peers import forms, layered, tries
from benchmarks._peers.forms import DENSE, Form, Spec
from benchmarks._peers.layered import Layer
from tests.support.programs import PROGRAMS
from tests.support.weight_uses import Kind

OPTIMISER = optax.adamw(1e-3)
Arrays = dict[str, Any]


class Step(NamedTuple):
    """A training step.

    Arguments:
        run: runs it, and returns what `block_until_ready` waits for.
        row: what is known of it: compiled costs, the loss, how many numbers it trains.
        change: `change() -> {path: s A B}` at its factors, written by hand; empty for a step without factors.
    """

    run: Callable[[], Any]
    row: dict[str, Any]
    change: Callable[[], Arrays]


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


class Problem(NamedTuple):
    """The transformer as a kind of weight on its own, its parameters by path, and tokens (batch, length)."""

    sizes: _transformer.Sizes
    kind: Kind
    params: Arrays
    tokens: np.ndarray


def problem(sizes: _transformer.Sizes, batch: int) -> Problem:
    """The same numbers in each process, which no program of JAX computes: its memory would count."""
    shapes = jax.eval_shape(lambda: _transformer.init(jax.random.key(0), sizes))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    paths = [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves]
    adapted = {path for path in paths if path.rsplit("_", 1)[-1] in _transformer.KERNELS}
    rng = np.random.default_rng(0)

    def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in path:
            return np.ones(shape, np.float32)
        scale = {"embed": 1.0, "position": 0.1}.get(path, shape[0] ** -0.5)
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    def use(p: Any, x: Any) -> jax.Array:
        return _transformer.unrolled(
            jax.tree.unflatten(treedef, [p[path] for path in paths]), x["x"], heads=sizes.heads
        )

    def form(call: Any, p: Any, factors: Any, x: jax.Array) -> jax.Array:
        named = [_Weight(path, p[path]) if path in adapted else p[path] for path in paths]
        product = lambda y, weight: call(weight.name, DENSE, weight.w, y)  # noqa: E731
        return _transformer.unrolled(jax.tree.unflatten(treedef, named), x, heads=sizes.heads, product=product)

    forms.FORMS["transformer"] = Form(form)
    params = {path: values(path, leaf.shape) for path, (_, leaf) in zip(paths, leaves, strict=True)}
    kind = Kind("transformer", {path: params[path].shape for path in paths if path in adapted}, {}, {}, use)
    tokens = rng.integers(sizes.vocabulary, size=(batch, sizes.length), dtype=np.int32)
    return Problem(sizes, kind, params, tokens)


def nonzero(tree: Any) -> Any:
    """Values for factors of these shapes, none of them zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.float32(0.05) * rng.standard_normal(leaf.shape, np.float32), tree)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean loss of the following token, that of the last one being the first."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, axis=1)).mean()


def training(library: str, given: Problem) -> tuple[Callable[..., Any], tuple[Any, ...], Callable[[], Arrays]]:
    """The step as a function, its arguments, and `change` of `Step`."""
    kind, x, change = given.kind, {"x": jnp.asarray(given.tokens)}, lambda: {}
    params: Arrays = {path: jnp.asarray(w) for path, w in given.params.items()}
    if library == "full":
        logits, trained, params = lambda trained, _, x: kind.use(trained, x), params, {}
    else:
        own = library != "by_hand"
        attempt = importlib.import_module(f"benchmarks._peers.{library}").attempt if own else layered.attempts(by_hand)
        made = attempt(kind, PROGRAMS[0], given.params, x)
        trained = jax.tree.map(jnp.asarray, nonzero(made.adapter))
        logits, change = lambda trained, params, x: made.side(params, trained, x), lambda: made.change(trained)

    def step(adapter: Any, state: Any, params: Any, x: Any) -> tuple[Any, Any, jax.Array]:
        def loss(adapter: Any) -> jax.Array:
            return cross_entropy(logits(adapter, params, x), x["x"])

        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, state = OPTIMISER.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step, (trained, OPTIMISER.init(trained), params, x), change


def compiled(library: str, given: Problem) -> Step:
    """The step of a library for JAX, and what the compiler says of it."""
    step, args, change = training(library, given)
    start = time.perf_counter()
    program = _measure.compile(step, *args)
    row = {
        "flops": program.flops,
        "temp_bytes": program.temp_bytes,
        "compile_seconds": program.compile_seconds,
        "lower_seconds": time.perf_counter() - start - program.compile_seconds,
        "trained": sum(leaf.size for leaf in jax.tree.leaves(args[0])),
        "loss": float(program.run()[-1]),
    }
    return Step(program.run, row, change)


def losses(given: Problem, change: Arrays) -> dict[str, float]:
    """The loss of the transformer itself, at its weights and at W + s A B."""
    loss = jax.jit(lambda params, x: cross_entropy(given.kind.use(params, x), x["x"]))
    x = {"x": jnp.asarray(given.tokens)}
    changed = given.params | {path: given.params[path] + delta for path, delta in change.items()}
    return {"base_loss": float(loss(given.params, x)), "reference_loss": float(loss(changed, x))}


def peak() -> int:
    """The largest memory that this process has taken, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sizes_of(sizes: dict[str, int]) -> _transformer.Sizes:
    """The sizes of the transformer, of those that a row of the benchmark has."""
    layers, width, vocabulary, length = (sizes[name] for name in ("layers", "width", "vocabulary", "length"))
    return _transformer.Sizes(layers, width, 4 * width, max(1, width // 64), vocabulary, length)


def main() -> None:
    """Reads the library and the sizes, and takes turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("sizes", type=json.loads, help="as JSON: layers, width, vocabulary, length, batch, rank")
    options = parser.parse_args()
    sizes = options.sizes
    tries.RANK, tries.ALPHA = sizes["rank"], 2.0 * sizes["rank"]
    library = None if options.library in ("by_hand", "full") else f"benchmarks._peers.{options.library}"
    module = importlib.import_module(library) if library else None
    imported = peak()
    print(flush=True)
    sys.stdin.readline()
    given = problem(sizes_of(sizes), sizes["batch"])
    # A library that is not for JAX has a step of its own.
    step = getattr(module, "step", functools.partial(compiled, options.library))(given)
    print(json.dumps(step.row | {"imported_bytes": imported}), flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(step.run())
        print((time.perf_counter() - start) / count, flush=True)
    row = {"peak_bytes": peak()}
    print(json.dumps(row | losses(given, step.change())), flush=True)


if __name__ == "__main__":
    main()
