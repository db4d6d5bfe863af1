"""The law in float64: nothing is rounded to float32 on the way."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support.agreement import difference, random
from tests.support.methods import METHODS, fitting

BOUND = 1e-12  # of float32 roundings that nothing amplifies, each is above 1e-9
DEFAULT = ["lora", "randlora"]


def program(params: Any, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
    """A product, a lookup and two convolutions."""
    image = x.reshape(1, -1, 2)
    y = lax.conv_general_dilated(image, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    z = lax.conv_general_dilated(
        image, params["grouped"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )
    return x @ params["up"], params["table"][rows], y, z


def filled(name: str, params: Any, *args: jax.Array) -> Any:
    """An adapter of a method in float64, of which no scale is a float32 number."""
    rng, sites = np.random.default_rng(1), jlora.trace(program, params, *args)
    targets = {}
    for path in params:
        fits = any(not method.unsupported_reason(sites[path]) for method in METHODS[name])
        targets[path] = fitting(name, sites[path]) if fits else jlora.LoRA(1)
    adapter = jax.jit(lambda: jlora.init(jax.random.key(0), sites, targets, params=params, dtype=jnp.float64))()
    for path, update in adapter.items():
        factors = {name: a + 0.3 * random(rng, a.shape, a.dtype) for name, a in update.factors.items()}
        adapter[path] = dataclasses.replace(update, factors=factors)
    return jlora.scale(adapter, 0.7)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.nightly]) for name in METHODS]
)
def test_values_and_gradients_have_the_precision_of_float64(name: str) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"up": (6, 4), "table": (5, 6), "kernel": (3, 2, 4), "grouped": (3, 1, 4)}
        params = {path: random(rng, shape, np.float64) for path, shape in shapes.items()}
        x, rows = random(rng, (4, 6), np.float64), jnp.asarray([1, 4])
        adapter = filled(name, params, x, rows)

        def side(fun: Any) -> Any:
            value, pull = jax.vjp(fun, adapter, x)
            return value, pull(
                jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), value)
            )

        def adapted(adapter: Any, x: jax.Array) -> Any:
            return jlora.adapt(program, on_dense="allow")(params, adapter, x, rows)

        def merged(adapter: Any, x: jax.Array) -> Any:
            return program(jlora.merge(params, adapter), x, rows)

        got, want = jax.jit(lambda: (side(adapted), side(merged)))()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype
            assert difference(a, b) <= BOUND
