"""Evolution strategies: the estimate of a generation, its cost, and that a reward without a gradient rises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import evolution
import jlora
from tests.support import toy_model


def test_the_estimate_is_the_weighted_sum_of_all_members() -> None:
    """Against the formula in NumPy, on plain and scanned kernels."""
    shapes = jax.eval_shape(lambda: evolution.init(jax.random.key(0), width=12))
    sites = jlora.trace(evolution.model, shapes, jax.ShapeDtypeStruct((4, 2), np.float32))
    params = toy_model.nonzero(shapes, 0)
    members = toy_model.nonzero(jax.eval_shape(lambda: evolution.population(jax.random.key(0), sites, 8, 0.1)), 1)
    scores = jnp.asarray(np.random.default_rng(2).normal(size=8), jnp.float32)
    merge = jax.jit(lambda members, params: jlora.merge(params, evolution.estimate(members, scores, step=0.5)))
    merged = merge(members, params)
    a, b = (np.asarray(members["out"].factors[factor]) for factor in "ab")
    np.testing.assert_allclose(merged["out"], params["out"] + 0.5 / 8 * np.einsum("k,kir,kro->io", scores, a, b), 1e-5)
    for name in ("up", "down"):
        a, b = (np.asarray(members[f"layers/{name}"].factors[factor]) for factor in "ab")
        change = 0.5 / 8 * np.einsum("k,klir,klro->lio", scores, a, b)
        np.testing.assert_allclose(merged["layers"][name], params["layers"][name] + change, atol=1e-5)
        assert np.linalg.matrix_rank(change).tolist() == [8, 8]


def test_members_cost_what_the_base_costs() -> None:
    assert evolution.cost_ratio(members=16, batch=8, width=512) <= 1.01


def test_a_reward_without_a_gradient_rises() -> None:
    tiny = ["--width=16", "--members=32", "--batch=32", "--generations=16", "--sigma=0.1", "--step=0.5"]
    accuracies = evolution.train(evolution.arguments(tiny))
    assert accuracies[0] < 0.7
    assert np.mean(accuracies[-4:]) > 0.8
