"""Banks, mixtures and sums of adapters in float64: no scale and no factor is rounded to float32 on the way."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.methods import METHODS, fitting

BOUND = 1e-14  # of float32 roundings that nothing amplifies, each is above 1e-9
SHAPE, COEFFICIENTS = (7, 6), (0.3, -0.7)
PARAMS = {"w": np.random.default_rng(0).normal(size=SHAPE)}


def use(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def members(dtype: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Two adapters whose scales are not float32 numbers, and what each adds, in NumPy."""
    rng, sites = np.random.default_rng(1), jlora.trace(use, PARAMS, np.ones((1, SHAPE[0])))
    adapters, changes = {}, []
    for name, method, scale in (
        ("third", jlora.LoRA(3, 1.0), 0.1 / 3),
        ("root", jlora.LoRA(2, 0.7, rank_stabilized=True), 0.07 / math.sqrt(2)),
    ):
        shapes = jax.eval_shape(lambda method=method: jlora.init(jax.random.key(0), sites, method, dtype=dtype))
        adapter = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
        adapters[name] = jlora.scale(adapter, 0.1)
        a, b = (np.asarray(adapter["w"].factors[name], np.float64) for name in "ab")
        changes.append(scale * a @ b)
    return adapters, changes


def near(value: Any, want: np.ndarray) -> None:
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, want, rtol=0, atol=BOUND * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.nightly)])
def test_a_bank_of_a_base_in_float64(dtype: str) -> None:
    with jax.enable_x64(True):
        adapters, changes = members(dtype)
        bank, x = jlora.bank.stack(adapters), np.random.default_rng(2).normal(size=(3, SHAPE[0]))
        rows = jax.jit(jlora.bank.apply(use, block=2))(PARAMS, bank, bank.ids(["root", None, "third"]), x)
        weights = [PARAMS["w"] + change for change in (changes[1], 0, changes[0])]
        near(rows, np.stack([row @ w for row, w in zip(x, weights, strict=True)]))
        sum_ = PARAMS["w"] + sum(c * d for c, d in zip(COEFFICIENTS, changes, strict=True))
        near(jlora.merge(PARAMS, jlora.bank.mixture(bank, jnp.asarray(COEFFICIENTS)))["w"], sum_)
        near(jlora.merge(PARAMS, bank["third"])["w"], weights[2])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "vera" else [pytest.mark.nightly]) for name in METHODS]
)
def test_members_of_one_method(name: str) -> None:
    with jax.enable_x64(True):
        rng, x = np.random.default_rng(1), np.random.default_rng(2).normal(size=(3, SHAPE[0]))
        sites = jlora.trace(use, PARAMS, x)
        method, options = fitting(name, sites["w"]), {"params": PARAMS, "dtype": np.float64}
        start = jax.jit(lambda: jlora.init(jax.random.key(0), sites, method, **options))()
        adapter = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape) if a.dtype == np.float64 else a, start)
        bank = jlora.bank.stack({"start": start, "trained": jlora.scale(adapter, 0.3)}, params=PARAMS)
        rows = jax.jit(jlora.bank.vmap(use, (None,), on_dense="allow"))(PARAMS, bank, x)
        merged = jax.jit(jlora.merge)(PARAMS, jlora.scale(adapter, 0.3))
        np.testing.assert_allclose(rows[1], x @ np.asarray(merged["w"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"how": "svd", "rank": 5}], ids=["concat", "svd"])
def test_a_sum_of_adapters_in_float64(options: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        adapters, changes = members(np.float64)
        combined, _ = jlora.combine(adapters, COEFFICIENTS, **options)
        sum_ = sum(c * d for c, d in zip(COEFFICIENTS, changes, strict=True))
        near(jlora.merge(PARAMS, combined)["w"], PARAMS["w"] + sum_)


def test_conversions_of_adapters_in_float64() -> None:
    with jax.enable_x64(True):
        adapters, changes = members(np.float64)
        truncated, _ = jlora.to_lora(adapters["third"], rank=2)
        u, s, v = np.linalg.svd(changes[0])
        near(jlora.merge(PARAMS, truncated)["w"], PARAMS["w"] + (u[:, :2] * s[:2]) @ v[:2])
        sites = jlora.trace(use, PARAMS, np.ones((1, SHAPE[0])))
        tuned = {"w": PARAMS["w"] + changes[1]}
        extracted, _ = jlora.extract(PARAMS, tuned, sites, rank=2)
        near(jlora.merge(PARAMS, extracted)["w"], tuned["w"])
        extracted, _ = jlora.extract(PARAMS, tuned, sites, targets=jlora.LoRA(2, 0.3))
        near(jlora.merge(PARAMS, extracted)["w"], tuned["w"])
