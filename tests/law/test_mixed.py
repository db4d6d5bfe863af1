"""The law for products of a weight with activations of another dtype: complex ones, and narrower ones."""

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

DEFAULT = ("fourierft",)


def of_complex(params: Any, x: jax.Array) -> jax.Array:
    """A product with complex activations, as after a Fourier transform. Weights and updates act on both parts."""
    with jax.numpy_dtype_promotion("standard"):
        y = lax.complex(x, jnp.cos(x)) @ params["w"]
    return jnp.stack([y.real, jnp.sin(y.imag)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.nightly]) for name in METHODS]
)
def test_complex_activations(name: str) -> None:
    rng = np.random.default_rng(0)
    params, x = {"w": rng.normal(size=(6, 8)).astype(np.float32)}, rng.normal(size=(5, 6)).astype(np.float32)
    sites = jlora.trace(of_complex, params, x)
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
        return jlora.adapt(of_complex, on_dense="allow")(params, adapter, x)

    def merged(adapter: Any, x: jax.Array) -> jax.Array:
        return of_complex(jlora.merge(params, adapter), x)

    got, want = jax.jit(lambda: (side(adapted), side(merged)))()
    assert [difference(a, b) <= F32 for a, b in zip(got, want, strict=True)] == [True] * 3


def of_narrow(params: Any, x: jax.Array) -> jax.Array:
    """A product of 16-bit activations with a weight of 32 bits, as exact as the weight."""
    return lax.dot_general(x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@pytest.mark.parametrize("method", [jlora.OFT(2), jlora.IA3("in")], ids=["oft", "ia3_in"])
def test_maps_of_narrow_activations(method: jlora.Method) -> None:
    """Maps of the activations round nothing to their 16 bits."""
    rng = np.random.default_rng(0)
    params, x = {"w": rng.normal(size=(6, 8)).astype(np.float32)}, jnp.asarray(rng.normal(size=(5, 6)), jnp.bfloat16)
    start = jlora.init(jax.random.key(0), jlora.trace(of_narrow, params, x), method, params=params)
    adapter = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), start)
    value = jax.jit(jlora.adapt(of_narrow, on_dense="error"))(params, adapter, x)
    merged = np.asarray(jlora.merge(params, adapter)["w"], np.float64)
    want = np.asarray(x, np.float64) @ merged
    np.testing.assert_allclose(value, want, rtol=0, atol=F32 * np.abs(want).max())
