"""The sum of the two products of a site on the CPU: what it keeps in memory, and that every use meets its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jlora
from tests.support import compiled as report
from tests.support.agreement import adapter_for, check_law

Tree = Any


def plus(y: jax.Array, b: jax.Array) -> jax.Array:
    return y + jnp.expand_dims(b, range(y.ndim - b.ndim))


USES: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "a bias": lambda y, b: jnp.tanh(plus(y, b)),
    "a bias on the left": lambda y, b: b[None, None] + y,
    "a bias that is subtracted": lambda y, b: y - b[None, None],
    "from a bias": lambda y, b: b[None, None] - y,
    "two biases": lambda y, b: plus(plus(y, b), b[0]) - 2.0,
    "a bias after a reshape and a transpose": lambda y, b: plus(y.reshape(3, 4, 2, 4).swapaxes(0, 1), b[:4]).sum(0),
    "a bias that has another axis": lambda y, b: y[:1] + jnp.stack([b, 2 * b, 3 * b])[:, None],
    "a sum that is broadcast": lambda y, b: y.sum((0, 1), keepdims=True) + y,
    "with itself": lambda y, b: y + y,
    "read again after the bias": lambda y, b: plus(y, b) * y,
    "an output, and a bias": lambda y, b: (y, plus(y, b)),
    "a checkpoint name": lambda y, b: plus(checkpoint_name(y, "y"), b),
    "jit": lambda y, b: jax.jit(plus)(y, b),
    "a loop": lambda y, b: jax.lax.scan(lambda c, x: (c + x, c * x), plus(y[0], b), y),
    "a branch": lambda y, b: jax.lax.cond(b[0] > 0, lambda y: plus(y, b), lambda y: -y, y),
    "sorted": lambda y, b: jnp.sort(plus(y, b)),
}


def program(p: Tree, x: jax.Array) -> dict[str, Any]:
    """One product for every use."""
    out = {name: use(k * x @ p["w"], p["b"]) for k, (name, use) in enumerate(USES.items(), 1)}
    return out | {"a bias that is trained": jnp.tanh(plus(x @ p["w"], p["trained"]))}


def test_every_use_meets_the_sum() -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 8), "b": (8,), "trained": (8,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
    targets = {"w": jlora.LoRA(2), "trained": jlora.Full()}
    adapter = adapter_for(jlora.trace(program, params, x), targets, rng)
    check_law(program, params, adapter, x, on_dense="allow")


def mlp(p: Tree, x: jax.Array) -> jax.Array:
    for layer in p:
        x = x + jax.nn.gelu(plus(x @ layer["up"], layer["bias"])) @ layer["down"]
    return x


def gated(p: Tree, x: jax.Array) -> jax.Array:
    for layer in p:
        x = x + (jax.nn.silu(x @ layer["up"]) * (x @ layer["gate"])) @ layer["down"]
    return x


def conv(p: Tree, x: jax.Array) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    for layer in p:
        y = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        x = x + jax.nn.gelu(plus(y, layer["bias"]))
    return x


def step(fun: Callable[..., Any], layer: dict[str, tuple[int, ...]], x: tuple[int, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The gradient with respect to the adapter of four layers, and its arguments' types."""
    shapes = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), ([layer] * 4, x), is_leaf=is_shape)
    sites = jlora.trace(fun, *shapes)
    kernels = [path for path in sites if not path.endswith("bias")]
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, dict.fromkeys(kernels, jlora.LoRA(4))))

    def gradient(adapter: Tree, params: Tree, x: jax.Array) -> Tree:
        return jax.grad(lambda a: jnp.mean(jnp.square(jlora.adapt(fun)(params, a, x))))(adapter)

    return gradient, (adapter, *shapes)


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


@pytest.mark.parametrize(
    ("fun", "layer", "x", "activation", "limit"),
    [
        (mlp, {"up": (64, 256), "bias": (256,), "down": (256, 64)}, (4, 32, 64), 128 * 256, 17),
        (gated, {"up": (64, 256), "gate": (64, 256), "down": (256, 64)}, (4, 32, 64), 128 * 256, 27),
        (conv, {"kernel": (3, 3, 16, 16), "bias": (16,)}, (2, 16, 16, 16), 512 * 16, 19),
    ],
    ids=["mlp", "gated", "conv"],
)
def test_the_sum_is_kept_and_not_its_terms(
    fun: Callable[..., Any], layer: Any, x: Any, activation: int, limit: float
) -> None:
    """For each of 4, 8 and 4 sums that a nonlinear function reads, one activation is kept, and not two.

    The limits, in activations, are half way between the two.
    """
    gradient, args = step(fun, layer, x)
    temporary = report.memory(jax.jit(gradient).lower(*args).compile()).temp_size_in_bytes
    assert temporary <= limit * 4 * activation


def test_other_platforms_get_no_barrier() -> None:
    gradient, args = step(mlp, {"up": (8, 16), "bias": (16,), "down": (16, 8)}, (2, 3, 8))
    traced = jax.jit(gradient).trace(*args)
    barriers = {
        platform: "optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert barriers == {"cpu": True, "cuda": False, "tpu": False}
