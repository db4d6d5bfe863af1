"""Targets that are a function of a path and its site."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from tests.support import toy_model

KEY = jax.random.key(5)


def narrow_ones(path: str, site: jlora.Site) -> jlora.Method | None:
    """A rank from the size of the weight, and nothing for the embedding."""
    if path == "embed" or not site.is_product:
        return None
    return jlora.LoRA(1 if site.max_rank * 2 > max(site.shape) else 2)


def test_they_select_as_patterns_do():
    sites = toy_model.sites()
    seen = {}

    def choose(path: str, site: jlora.Site) -> jlora.Method | None:
        seen[path] = site
        return narrow_ones(path, site)

    chosen = jlora.init(KEY, sites, choose)
    patterns = {path: method for path in sites if (method := narrow_ones(path, sites[path]))}
    assert seen == dict(sites)
    assert set(patterns) == {"layers/up", "layers/down", "mix/kernel"}
    expected = jlora.init(KEY, sites, patterns)
    assert jax.tree.structure(chosen) == jax.tree.structure(expected)
    assert all(map(np.array_equal, jax.tree.leaves(chosen), jax.tree.leaves(expected)))


def test_they_take_every_place_of_targets():
    sites, params = toy_model.sites(), toy_model.params()
    with_bias = jlora.with_biases(sites, narrow_ones, "lora_only")
    assert "mix/bias" in with_bias
    assert "embed" not in with_bias
    after = jax.tree.map(lambda a: a + 0.1, params)
    difference, _ = jlora.extract(
        params, after, sites, targets=lambda path, site: jlora.LoRA(1) if path == "mix/kernel" else None
    )
    assert list(difference) == ["mix/kernel"]
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    adapted = jlora.nnx.adapt(
        model, lambda path, site: jlora.IA3() if len(site.shape) == 2 else None, jnp.ones((2, 3)), rngs=nnx.Rngs(0)
    )
    assert list(jlora.nnx.adapter(adapted)) == ["kernel"]


@pytest.mark.parametrize("value", [True, "lora", 8, jlora.LoRA, {"a": jlora.LoRA(2)}])
def test_a_value_that_is_no_method(value: Any):
    with pytest.raises(TypeError, match=r"Targets are a method .*; for mix/kernel it returned "):
        jlora.init(KEY, toy_model.sites(), lambda path, site: value if path == "mix/kernel" else jlora.Full())


def test_nothing_chosen():
    with pytest.raises(ValueError, match="returned None for all 6 parameters"):
        jlora.init(KEY, toy_model.sites(), lambda path, site: None)


def test_a_weight_that_the_method_cannot_adapt():
    with pytest.raises(ValueError, match="LoRA cannot adapt layers/bias"):
        jlora.init(KEY, toy_model.sites(), lambda path, site: jlora.LoRA(1))
