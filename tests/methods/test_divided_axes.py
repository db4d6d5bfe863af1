"""Adapters of one list that divide an axis of a weight into blocks of different sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.agreement import close

KEY = jax.random.key(2)
WEIGHT, X = jax.random.normal(KEY, (2, 12, 8)), jax.random.normal(KEY, (3, 12))
PARAMS = {"w": WEIGHT}


def layers(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda total, w: (total + x @ w, None), jnp.zeros((3, 8)), params["w"])[0]


def adapter_of(method: jlora.Method, seed: int, noise: float = 0.3) -> jlora.Adapter:
    adapter = jlora.init(KEY, jlora.trace(layers, PARAMS, X), {"w": method})
    key = jax.random.fold_in(KEY, seed)
    return jax.tree.map(lambda a: a + noise * jax.random.normal(key, a.shape, a.dtype), adapter)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(jlora.LoKr(1, 3.0, layers=(1,)), id="some layers"),
        pytest.param(jlora.QALoRA(1, 2, layers=(0,)), id="the other layers", marks=pytest.mark.nightly),
        pytest.param(jlora.DoRA(1), id="a norm"),
        pytest.param(jlora.DoRA(1, layers=(1,)), id="a norm of some layers", marks=pytest.mark.nightly),
    ],
)
def test_adapters_apply_one_after_the_other(second: jlora.Method):
    first = adapter_of(jlora.RoAd(1, 4) if isinstance(second, jlora.DoRA) else jlora.OFT(3), 5)
    pair = [first, adapter_of(second, 6)]
    close(jlora.merge(PARAMS, pair), jlora.merge(jlora.merge(PARAMS, pair[0]), pair[1]))


def test_an_offset_subtracts_what_its_own_factors_add_at_the_start():
    rotated = adapter_of(jlora.OFT(4), 5)
    start = adapter_of(jlora.QALoRA(1, 6, offset=True), 6, noise=0.0)
    merged = jlora.merge(PARAMS, rotated)["w"]
    assert np.abs(merged - WEIGHT).max() > 0.1
    close(jlora.merge(PARAMS, [rotated, start])["w"], merged)
