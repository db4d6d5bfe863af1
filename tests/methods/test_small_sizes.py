"""The law of every method on tables with prime sizes, and with axes of one entry: products, lookups and slices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support.agreement import adapter_for, check_law, random
from tests.support.draw import drawn
from tests.support.methods import METHODS

SHAPES = [(5, 5), (5, 3), (1, 4), (4, 1), (1, 1)]


def tied(params: Any, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
    """A table in a lookup, in a slice at a traced position, and in a product from each side."""
    w = params["w"]
    row = lax.dynamic_slice(w, (rows[0], jnp.int32(0)), (1, w.shape[1]))
    return w[rows] * x, row * x, x @ w.T, jnp.ones((2, w.shape[0])) @ w


def is_default(name: str, shape: tuple[int, ...]) -> bool:
    return drawn(name, str(shape), one_in=10)


def cases() -> list[Any]:
    """A tenth of the methods by default, another one every day; all of them nightly."""
    return [
        pytest.param(
            name, shape, id=f"{name}-{shape}", marks=[] if drawn(name, str(shape), one_in=10) else [pytest.mark.nightly]
        )
        for name in METHODS
        for shape in SHAPES
        if name != "hra" or shape[0] > 1  # two reflections of a line are the identity: all gradients are zero
    ]


@pytest.mark.parametrize(("name", "shape"), cases())
def test_a_table_of_few_entries(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)}
    x, rows = jnp.asarray(rng.normal(size=(2, shape[1])), jnp.float32), jnp.array([shape[0] - 1, 0])
    sites = jlora.trace(tied, params, x, rows)
    fitting = [method for method in METHODS[name] if not method.unsupported_reason(sites["w"])]
    targets = {"w": fitting[0] if fitting else jlora.LoRA(1, 3.0)}  # the method's sizes may exceed those of the table
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, targets, params=params))
    adapter = jax.tree.map(lambda leaf: random(rng, leaf.shape, leaf.dtype), shapes)
    check_law(tied, params, adapter, x, rows, on_dense="allow")


@pytest.mark.parametrize("both", [False, True])
def test_a_kronecker_product_of_prime_sizes_is_looked_up(both: bool) -> None:
    """One of its factors is a scalar."""
    params = {"w": jnp.ones((5, 5))}
    x, rows = jnp.ones((2, 5)), jnp.array([2, 0])
    sites = jlora.trace(tied, params, x, rows)
    adapter = adapter_for(sites, {"w": jlora.LoKr(1, 3.0, decompose_both=both)}, np.random.default_rng(0))
    check_law(tied, params, adapter, x, rows)
