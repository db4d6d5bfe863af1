"""The rules of `jlora.combine` that prune: by magnitude, by sign and at random, against formulas in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.bank.test_combine import ALL_RANKS, KEY, PARAMS, WEIGHTS, change, matrices, members, summed
from tests.support.agreement import close


def kept(value: np.ndarray, density: float) -> np.ndarray:
    """The largest entries in magnitude."""
    threshold = np.sort(np.abs(value), axis=None)[value.size - int(density * value.size)]
    return np.where(np.abs(value) >= threshold, value, 0)


def elected(values: np.ndarray) -> np.ndarray:
    """The mean over adapters of the entries with the sign of the sum."""
    agrees = np.sign(values) == np.sign(values.sum(0))
    agrees &= values != 0
    return np.where(agrees, values, 0).sum(0) / np.maximum(agrees.sum(0), 1)


DENSITY = 0.4


@pytest.mark.parametrize("how", ["ties", "magnitude"])
def test_pruning_by_magnitude(how):
    """Each layer of a stack is pruned by itself; biases follow the same rule."""
    adapters = list(members().values())
    changes = [change(a) for a in adapters]
    combined, errors = jlora.combine(adapters, WEIGHTS, how=how, density=DENSITY, rank=ALL_RANKS, params=PARAMS)
    for path, value in summed(changes, WEIGHTS).items():
        terms = [w * matrices(path, c.get(path, np.zeros_like(value))) for w, c in zip(WEIGHTS, changes, strict=True)]
        pruned = [np.stack([kept(layer, DENSITY) if layer.any() else layer for layer in term]) for term in terms]
        expected = elected(np.stack(pruned)) if how == "ties" else sum(pruned)
        close(matrices(path, change(combined)[path]), expected, 1e-5)
        assert errors[path] < 1e-6
    truncated_, errors = jlora.combine(adapters, WEIGHTS, how=how, density=DENSITY, rank=2)
    assert 0 < max(errors.values()) < 1
    assert vars(truncated_["embed"].method)["rank"] == 2


def test_ties_takes_the_side_with_the_larger_sum():
    """Two small positive entries against one large negative one; two that cancel; one alone."""
    first = np.array([[1.0, 5.0, 0.0], [2.0, 1.0, 3.0]])
    second = np.array([[1.0, -5.0, 0.0], [4.0, 1.0, 0.0]])
    third = np.array([[-7.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    expected = [[-7.0, 0.0, 2.0], [3.0, 1.0, 3.0]]
    combined, _ = jlora.combine([exact(v) for v in (first, second, third)], how="ties", density=1, rank=2)
    close(change(combined, {"w": jnp.zeros((2, 3))})["w"], np.array(expected))


def exact(value: np.ndarray) -> dict[str, jlora.Update]:
    """A LoRA that adds a matrix: itself times the identity."""
    factors = {"a": jnp.asarray(value, jnp.float32), "b": jnp.eye(value.shape[1])}
    return {"w": jlora.Update(factors, jlora.LoRA(value.shape[1]), ("in", "out"), value.shape)}


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_dropping_at_random(how):
    """What is dropped is what is dropped from ones, by the same key."""
    rng = np.random.default_rng(1)
    values, ones = rng.normal(size=(3, 20, 30)), np.ones((20, 30))
    names = ["x", "y", "z"]

    def run(matrices_: list[np.ndarray], key: jax.Array = KEY) -> np.ndarray:
        adapters = dict(zip(names, map(exact, matrices_), strict=True))
        combined, _ = jlora.combine(adapters, how=how, density=0.3, key=key, rank=ALL_RANKS)
        return change(combined, {"w": jnp.zeros((20, 30))})["w"]

    nothing = np.zeros_like(ones)
    masks = [run([ones if k == member else nothing for k in range(3)]) for member in range(3)]
    for mask in masks:
        assert np.all(np.isclose(mask, 0, atol=1e-4) | np.isclose(mask, 1 / 0.3, atol=1e-4))
        assert abs(np.mean(mask > 1) - 0.3) < 0.06  # more than three standard deviations
    assert all(np.abs(masks[k] - masks[k - 1]).max() > 1 for k in range(3))
    dropped = np.stack([value * np.round(mask * 0.3) / 0.3 for value, mask in zip(values, masks, strict=True)])
    close(run(list(values)), elected(dropped) if how == "dare_ties" else dropped.sum(0), 1e-5)
    assert np.abs(run(list(values)) - run(list(values), jax.random.key(6))).max() > 0.1


def test_random_numbers_do_not_depend_on_other_adapters_or_targets():
    adapters = members()
    options: dict[str, Any] = {"how": "dare", "density": 0.5, "key": KEY, "rank": ALL_RANKS}
    alone = change(jlora.combine({"stabilised": adapters["stabilised"]}, **options)[0])
    weights = {"offset": 0, "stabilised": 1}
    beside = change(jlora.combine({name: adapters[name] for name in weights}, weights, **options)[0])
    close(beside, alone, 1e-5)
    less = {"layers/up": adapters["stabilised"]["layers/up"]}
    close(change(jlora.combine({"stabilised": less}, **options)[0])["layers/up"], alone["layers/up"], 1e-5)
    first, second = alone["layers/up"][0], alone["layers/up"][1]
    assert ((np.abs(first) < 1e-6) != (np.abs(second) < 1e-6)).any()
