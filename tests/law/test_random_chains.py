"""The law over random chains of operations between a weight and its product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings
from jax import lax

import jlora
from tests.support.random_chains import Chain, any_chains, apply, factored_chains
from tests.support.random_law import CHAINS, FRESH, law, tolerance


def chain_law(case: Chain, *, factored: bool) -> None:
    """If the chain may be dense, a product with the unchanged weight comes first, and defines the roles of its axes."""
    names = {role: tuple(k for k, r in enumerate(case.roles) if r == role) for role in ("in", "out", "stack")}
    plain = case.seed % len(case.shape)

    def f(params: Any, x: jax.Array, y: jax.Array) -> Any:
        first = None if factored else lax.dot_general(y, params["w"], (((0,), (plain,)), ((), ())))
        w = params["w"]
        for op in case.ops:
            w = apply(op, w, params)
        if case.conv:
            spec = (names["out"][0], *names["in"])
            numbers = lax.ConvDimensionNumbers(tuple(range(x.ndim)), spec, tuple(range(x.ndim)))
            return first, lax.conv_general_dilated(x, w, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers)
        count = len(names["in"])
        inner, batch = tuple(range(count)), tuple(range(count, count + len(names["stack"])))
        if case.seed // 8 % 2:
            return first, lax.dot_general(w, x, ((names["in"], inner), (names["stack"], batch)))
        return first, lax.dot_general(x, w, ((inner, names["in"]), (batch, names["stack"])))

    used = tuple(case.end[k] for k in (*names["in"], *names["stack"]))
    shapes = {"w": case.shape, **case.others}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((2, *used) if case.conv else (*used, 2), jnp.float32)
    y = jax.ShapeDtypeStruct((case.shape[plain], 2), jnp.float32)
    sites = jlora.trace(f, params, x, y)
    targets = {"w": jlora.LoRA(rank=case.rank, alpha=3.0)}
    targets |= {name: jlora.LoRA(rank=1, alpha=3.0) for name in case.others if not sites[name].unsupported_reason}
    assume(not targets["w"].unsupported_reason(sites["w"]))
    bound = tolerance(*["bfloat16"] * case.low, jnp.float32)
    law(f, params, targets, case.seed, x, y, bound=bound, factored=factored)


@settings(CHAINS)
@given(factored_chains())
def test_structural_chains_stay_factored(case: Chain) -> None:
    chain_law(case, factored=True)


@settings(CHAINS)
@given(any_chains())
def test_any_chain(case: Chain) -> None:
    chain_law(case, factored=False)


@pytest.mark.nightly
@settings(FRESH)
@given(factored_chains())
def test_structural_chains_stay_factored_at_length(case: Chain) -> None:
    chain_law(case, factored=True)


@pytest.mark.nightly
@settings(FRESH)
@given(any_chains())
def test_any_chain_at_length(case: Chain) -> None:
    chain_law(case, factored=False)
