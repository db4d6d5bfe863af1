"""How the cost of a training step grows with the model, each with a fitted slope: jlora, by hand, full fine-tuning.

    python -m benchmarks.scaling                                      # about ten minutes on two cores
    python -m benchmarks.scaling --rounds 0 --axes rank --out x.json  # compiled figures and tracing alone

One size of the model changes while the others stay at `BASE`: layers, width, tokens, rank, or the number of adapted
kernels in a layer. A slope is the exponent of a power law, fitted to the logarithms by least squares, with its standard
error: 1 is linear. At the end 512 unrolled layers are traced and lowered. Each size is saved at once.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks import _byhand, _measure, _scaling_report, _transformer
from benchmarks._scaling_report import PROGRAMS, RESULT
from jlora._compat import bodies


@dataclass(frozen=True)
class Point:
    """A model and its adapter.

    Arguments:
        depth: layers, unrolled.
        width: of the residual stream; the MLP has four times as much.
        tokens: of a step, in sequences of `LENGTH`.
        rank: of the LoRA.
        sites: adapted kernels of a layer, the first of `KERNELS`.
    """

    depth: int = 4
    width: int = 256
    tokens: int = 512
    rank: int = 8
    sites: int = 6


BASE, LENGTH, VOCABULARY = Point(), 64, 256
KERNELS = ("wq", "wk", "wv", "wo", "w1", "w2")
AXES = {
    "depth": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "tokens": (256, 512, 1024, 2048),
    "rank": (4, 16, 64, 256),
    "sites": (1, 2, 4),  # square kernels
}


def programs(point: Point, length: int = LENGTH) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The gradients of the loss, each with its arguments as shapes."""
    sizes = _transformer.Sizes(
        layers=point.depth,
        width=point.width,
        hidden=4 * point.width,
        heads=4,
        vocabulary=VOCABULARY,
        length=length,
    )
    params = jax.eval_shape(lambda: _transformer.init(jax.random.key(0), sizes))
    tokens = jax.ShapeDtypeStruct((point.tokens // length, length), jnp.int32)

    def model(params: Any, tokens: Any, product: Any = jnp.matmul) -> jax.Array:
        return _transformer.unrolled(params, tokens, heads=sizes.heads, product=product)

    targets = {f".*/({'|'.join(KERNELS[: point.sites])})": jlora.LoRA(point.rank, 2.0 * point.rank)}
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), jlora.trace(model, params, tokens), targets))
    factors = {path: (update.factors["a"], update.factors["b"]) for path, update in adapter.items()}

    def flattened(x: jax.Array, weight: Any) -> jax.Array:
        return _byhand.flattened(2.0)(x, weight) if isinstance(weight, _byhand.Weight) else x @ weight

    return gradients(
        model,
        lambda factors, params, *args: model(_byhand.attach(params, factors), *args, product=flattened),
        (adapter, factors, params),
        tokens,
    )


def gradients(
    model: Callable[..., jax.Array], by_hand: Callable[..., jax.Array], trees: tuple[Any, Any, Any], *args: Any
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Three gradients, each with its arguments.

    Arguments:
        model: (params, *args) -> logits.
        by_hand: (factors, params, *args) -> logits.
        trees: adapter, factors, params.
        args: of the model.
    """
    adapter, factors, params = trees
    adapted = jlora.adapt(model)

    def mean_square(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.grad(lambda *args: jnp.mean(forward(*args) ** 2))

    return {
        "jlora": (
            mean_square(lambda adapter, params, *args: adapted(params, adapter, *args)),
            (adapter, params, *args),
        ),
        "by hand": (mean_square(by_hand), (factors, params, *args)),
        "full fine-tuning": (mean_square(model), (params, *args)),
    }


def equations(jaxpr: Any) -> int:
    """The equations of a program, with those of the programs inside."""
    inner = ([body for body, _ in bodies(eqn)] for eqn in jaxpr.eqns)
    return sum(sum(map(equations, programs)) if programs else 1 for programs in inner)


def lower(gradient: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, Any, Any]:
    """CPU seconds to trace and lower a gradient that no cache of JAX has seen, what was traced and what was lowered."""
    jax.clear_caches()
    gc.collect()
    begin = time.process_time()
    traced = jax.jit(lambda *args: gradient(*args)).trace(*args)
    lowered = traced.lower()
    return time.process_time() - begin, traced, lowered


def count(point: Point, length: int = LENGTH) -> tuple[int, float]:
    """What tracing tells of the adapted gradient: its equations, and its FLOPs before it is compiled."""
    _, traced, lowered = lower(*programs(point, length)["jlora"])
    return equations(traced.jaxpr.jaxpr), lowered.cost_analysis()["flops"]


def measure(point: Point, rounds: int, lowerings: int) -> dict[str, dict[str, Any]]:
    """All figures of one model."""
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    rng = np.random.default_rng(0)
    for name, (gradient, args) in programs(point).items():
        measured = [lower(gradient, args) for _ in range(lowerings)]
        _, traced, lowered = measured[-1]
        values = [jax.tree.map(functools.partial(_values, rng), arg) for arg in args] if rounds else args
        program = lowered.compile()
        costs, memory = program.cost_analysis(), program.memory_analysis()
        calls[name] = functools.partial(program, *values)
        rows[name] = {
            "flops": costs["flops"],
            "temp_bytes": memory.temp_size_in_bytes,
            "equations": equations(traced.jaxpr.jaxpr),
            "lower_seconds": statistics.median(seconds for seconds, _, _ in measured),
            "lowerings": [seconds for seconds, _, _ in measured],
        }
    for name, seconds in _measure.interleave(calls, rounds).items():
        rows[name] |= {"seconds": _measure.median(seconds), "rounds": seconds}
    return rows


def _values(rng: np.random.Generator, shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, VOCABULARY, shape.shape), shape.dtype)
    return jnp.asarray(0.02 * rng.standard_normal(shape.shape), shape.dtype)


TOWERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "tanh(x w)": lambda x, y: jnp.tanh(y),
    "x + gelu(x w)": lambda x, y: x + jax.nn.gelu(y),
}


def tower(form: str, layers: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The gradients of a model with one kernel in each layer, which has nothing beside the products."""
    activate, width = TOWERS[form], 64

    def model(params: Any, x: Any) -> jax.Array:
        for w in params:
            x = activate(x, x @ w)
        return x

    def by_hand(factors: Any, params: Any, x: Any) -> jax.Array:
        for w, (a, b) in zip(params, factors, strict=True):
            x = activate(x, x @ w + 2.0 * ((x @ a) @ b))
        return x

    x, params = jax.ShapeDtypeStruct((8, width), jnp.float32), [jax.ShapeDtypeStruct((width, width), jnp.float32)]
    params *= layers
    adapter = jax.eval_shape(
        lambda: jlora.init(jax.random.key(0), jlora.trace(model, params, x), {".*": jlora.LoRA(4, 8.0)})
    )
    factors = [(update.factors["a"], update.factors["b"]) for update in adapter.values()]
    return gradients(model, by_hand, (adapter, factors, params), x)


def towers(layers: int, lowerings: int) -> dict[str, dict[str, Any]]:
    """CPU seconds to trace and lower the gradients of deep models, in turns, and the ratio to the base's gradient."""
    out = {}
    for form in TOWERS:
        seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
        for _ in range(lowerings):
            for name, program in tower(form, layers).items():
                seconds[name].append(lower(*program)[0])
        ratio = _measure.ratio(seconds, "jlora", "full fine-tuning")
        out[form] = {"seconds": seconds, "of the base": ratio, "of by hand": _measure.ratio(seconds, *PROGRAMS[:2])}
    return out


def main() -> None:
    """Measures every size, saves, prints and draws."""
    parser = _measure.parser(__doc__, RESULT.name)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument("--points", type=int, default=4, help="the smallest sizes of an axis (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps (default: 5; 0 times none)")
    parser.add_argument("--lowerings", type=int, default=3, help="times that a program is lowered (default: 3)")
    parser.add_argument("--layers", type=int, default=512, help="of the deep models (default: 512)")
    options: argparse.Namespace = parser.parse_args()
    recorded = {name: value for name, value in vars(options).items() if name != "out"}
    result: dict[str, Any] = {"environment": _measure.environment(), "options": recorded, "axes": {}}
    for axis in options.axes:
        points = result["axes"].setdefault(axis, {})
        for size in AXES[axis][: options.points]:
            points[str(size)] = measure(replace(BASE, **{axis: size}), options.rounds, options.lowerings)
            _measure.save(options.out, result)
    result["towers"] = towers(options.layers, options.lowerings)
    _measure.save(options.out, result)
    for form, row in result["towers"].items():
        print(f"{form}: {row['of the base']:.2f} of the gradient of all weights, {row['of by hand']:.2f} of by hand")
    print(
        {
            axis: {m: rows.get("jlora") for m, rows in fitted.items()}
            for axis, fitted in _scaling_report.slopes(result["axes"]).items()
        }
    )
    if options.out == RESULT:
        _scaling_report.draw(result)


if __name__ == "__main__":
    main()
