"""What `jlora.combine` refuses, and what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.bank.test_combine import KEY
from tests.support import toy_model


def any_combine(*args: Any, **options: Any) -> Any:
    """`jlora.combine` for arguments of the wrong type."""
    return jlora.combine(*args, **options)


def other_roles() -> dict[str, jlora.Update]:
    update = toy_model.adapter()["mix/kernel"]
    return {"mix/kernel": dataclasses.replace(update, roles=("out", "in"))}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: any_combine(a), TypeError, "found one adapter"),
        (lambda a: any_combine(iter([a])), TypeError, "found list_iterator"),
        (lambda a: any_combine([[a]]), TypeError, "Expected one adapter, found a list"),
        (lambda a: any_combine([]), ValueError, "no adapters"),
        (lambda a: any_combine([a, a], [1]), ValueError, "1 weights for 2 adapters"),
        (lambda a: any_combine([a], [np.nan]), ValueError, "weight of adapter 0 is nan"),
        (lambda a: any_combine({"x": a}, {"y": 1}), ValueError, "name the same"),
        (lambda a: any_combine([a], how="slerp"), ValueError, "'concat', 'svd', 'ties'"),
        (lambda a: any_combine([a], rank=3), ValueError, "'concat' is exact"),
        (lambda a: any_combine([a], how="ties", density=0.5), ValueError, "pass a rank or an energy"),
        (lambda a: any_combine([a], how="ties", rank=2), ValueError, "needs `density`"),
        (lambda a: any_combine([a], how="svd", density=0.5), ValueError, "no use for `density`"),
        (lambda a: any_combine([a], how="ties", rank=2, density=0.5, key=KEY), ValueError, "no use for `key`"),
        (lambda a: any_combine([a], how="dare", rank=2, density=0.5), ValueError, "needs `key`"),
        (lambda a: any_combine([a], how="ties", rank=2, density=0.0), ValueError, r"in \(0, 1\]"),
        (lambda a: any_combine([a], how="svd", rank=0), ValueError, "positive integer"),
        (lambda a: any_combine([a], how="svd", energy=1.5), ValueError, r"in \(0, 1\], not 1.5"),
        (lambda a: any_combine({"x": a, "y": other_roles()}), ValueError, "mix/kernel has the roles .* in adapter y"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(toy_model.adapter())


def test_a_factor_that_is_not_finite():
    adapter = toy_model.adapter()
    update = adapter["embed"]
    bad = dataclasses.replace(update, factors=update.factors | {"a": update["a"].at[0, 0].set(jnp.nan)})
    with pytest.raises(
        ValueError, match="embed: the combination by 'svd' cannot be decomposed, because it has entries"
    ):
        jlora.combine([adapter | {"embed": bad}], how="svd", rank=1)
