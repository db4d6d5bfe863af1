"""`to_lora`: updates of every method as LoRA, exact or truncated to a given rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import methods, toy_model
from tests.support.agreement import close


def wide(p: dict, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda y, w: (y, x @ w), x, p["layers"])[1]


# Methods without a low rank, or with one that no factors of theirs show.
DENSE = {
    *("dora", "full", "hadamard_sigmoid", "hadamard_tanh", "hira", "ia3", "ia3_in", "oft", "boft", "randlora"),
    *("shira",),
}


BY_SVD = {"hra", "fourierft", "lokr", "lokr_both"}


def stacked_adapter(name):
    """Parameters of two layers, and an adapter of them by a method of the catalogue."""
    params = {"layers": jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 30)), jnp.float32)}
    sites = jlora.trace(wide, params, jnp.ones((3, 24)))
    method = methods.fitting(name, sites["layers"])
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, {"layers": method}, params=params))
    return params, toy_model.nonzero(shapes)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_a_dense_update_becomes_a_lora_only_if_a_rank_is_given(name):
    params, adapter = stacked_adapter(name)
    with pytest.raises(ValueError, match="so no LoRA is smaller"):
        jlora.to_lora(adapter, params)
    truncated, errors = jlora.to_lora(adapter, params, rank=3)
    assert vars(truncated["layers"].method)["rank"] == 3
    assert 0 < errors["layers"] < 1


@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - DENSE))
def test_a_low_rank_update_becomes_a_lora_that_adds_the_same(name):
    params, adapter = stacked_adapter(name)
    lora, errors = jlora.to_lora(adapter, params)
    assert {type(update.method) for update in lora.values()} == {jlora.LoRA}
    assert max(errors.values()) <= (1e-6 if name in BY_SVD else 0)
    close(jlora.merge(params, lora), jlora.merge(params, adapter))


def test_to_lora_keeps_lora_and_asks_for_the_base():
    adapter = toy_model.adapter()
    same, errors = jlora.to_lora(adapter)
    assert all(same[path] is update for path, update in adapter.items())
    assert set(errors.values()) == {0}
    with pytest.raises(ValueError, match="Pass params"):
        jlora.to_lora(toy_model.adapter(jlora.DoRA(2)))
