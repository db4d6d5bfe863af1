"""The law for activations that are complex: weights and updates are real, and act on both parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support.agreement import F32, difference
from tests.support.methods import METHODS, fitting

DEFAULT = ("lora", "fourierft")


def program(params: Any, x: jax.Array) -> jax.Array:
    """A product with complex activations, as after a Fourier transform; its parts."""
    with jax.numpy_dtype_promotion("standard"):
        y = lax.complex(x, jnp.cos(x)) @ params["w"]
    return jnp.stack([y.real, jnp.sin(y.imag)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.nightly]) for name in METHODS]
)
def test_values_and_gradients(name: str) -> None:
    rng = np.random.default_rng(0)
    params, x = {"w": rng.normal(size=(6, 8)).astype(np.float32)}, rng.normal(size=(5, 6)).astype(np.float32)
    sites = jlora.trace(program, params, x)
    method = fitting(name, sites["w"])
    start = jax.jit(lambda: jlora.init(jax.random.key(0), sites, method, params=params))()
    adapter = jax.tree.map(
        lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32) if a.dtype == np.float32 else a, start
    )

    def side(fun: Any) -> Any:
        value, pull = jax.vjp(fun, adapter, x)
        of_adapter, of_x = pull(jnp.cos(value))
        return value, {path: update.factors for path, update in of_adapter.items()}, of_x

    def adapted(adapter: Any, x: jax.Array) -> jax.Array:
        return jlora.adapt(program, on_dense="allow")(params, adapter, x)

    def merged(adapter: Any, x: jax.Array) -> jax.Array:
        return program(jlora.merge(params, adapter), x)

    got, want = jax.jit(lambda: (side(adapted), side(merged)))()
    assert [difference(a, b) <= F32 for a, b in zip(got, want, strict=True)] == [True] * 3
