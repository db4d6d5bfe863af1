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
    *("dora", "full", "glora", "glora_lora", "hadamard_sigmoid", "hadamard_tanh", "hira", "ia3", "ia3_in", "oft"),
    *("boft", "randlora", "randlora_shared", "shira", "c3a", "road", "road_4"),
    *("oft_shared", "frod", "frod_apart", "rows", "rows_out"),
}


BY_SVD = {"hra", "fourierft", "waveft", "lokr", "lokr_both", "supra"}


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


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - DENSE))
def test_a_low_rank_update_becomes_a_lora_that_adds_the_same(name):
    params, adapter = stacked_adapter(name)
    lora, errors = jlora.to_lora(adapter, params)
    assert {type(update.method) for update in lora.values()} == {jlora.LoRA}
    assert max(errors.values()) <= (1e-6 if name in BY_SVD else 0)
    close(jlora.merge(params, lora), jlora.merge(params, adapter))


def changes(adapter: dict, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """What an adapter adds to a weight of zeros, in float64."""
    return np.asarray(jlora.merge({path: jnp.zeros(shape)}, {path: adapter[path]})[path], np.float64)


def truncation(value: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The nearest matrices of a rank, and the relative error of the worst one."""
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    error = np.sqrt(np.square(s[..., rank:]).sum(-1) / np.square(s).sum(-1)).max()
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], float(error)


CASES = {"embed": (11, 8), "mix/kernel": (8, 8), "layers/up": (3, 8, 12)}
MANY = jlora.LoRA(5, 3.0, rank_stabilized=True)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("method", [MANY, jlora.LoRA(3, offset=True), jlora.Full()], ids=["lora", "offset", "full"])
@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_the_lowest_rank_that_keeps_an_energy_in_every_layer(method, energy):
    targets = dict.fromkeys(CASES, method)
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), toy_model.sites(), targets))
    adapter = toy_model.nonzero(shapes)
    lora, errors = jlora.to_lora(adapter, energy=energy)
    for path, shape in CASES.items():
        value = changes(adapter, path, shape)
        squares = np.square(np.linalg.svd(value, compute_uv=False).reshape(-1, 8))
        shares = np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)
        rank = vars(lora[path].method)["rank"]
        expected, error = truncation(value, rank)
        close(changes(lora, path, shape), expected, 1e-5)
        assert errors[path] == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert shares[:, rank - 1].min() >= energy - 1e-6
        assert rank == 1 or shares[:, rank - 2].min() < energy


def test_a_rank_truncates_lora_too():
    adapter = toy_model.adapter(MANY)
    lora, errors = jlora.to_lora(adapter, rank=2)
    for path, shape in CASES.items():
        expected, error = truncation(changes(adapter, path, shape), 2)
        close(changes(lora, path, shape), expected, 1e-5)
        assert errors[path] == pytest.approx(error, rel=1e-3)
    capped, errors = jlora.to_lora(adapter, rank=2, energy=0.999)
    assert {vars(update.method)["rank"] for update in capped.values()} == {2}
    lower, _ = jlora.to_lora(adapter, rank=2, energy=0.1)
    assert {vars(update.method)["rank"] for update in lower.values()} == {1}
    same, errors = jlora.to_lora(adapter, rank=5)
    assert all(same[path] is update for path, update in adapter.items())
    assert set(errors.values()) == {0}


def test_an_update_that_adds_nothing():
    """Also of a method that depends on the base, which is not needed then."""
    adapter = jlora.scale(toy_model.adapter(jlora.DoRA(2)), 0)
    lora, errors = jlora.to_lora(adapter)
    assert not changes(lora, "mix/kernel", (8, 8)).any()
    assert set(errors.values()) == {0}


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.01, float("nan")])
def test_an_energy_that_is_not_a_share(energy):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        jlora.to_lora(toy_model.adapter(), energy=energy)
    with pytest.raises(ValueError, match="positive integer, not 0"):
        jlora.to_lora(toy_model.adapter(), rank=0)


@pytest.mark.parametrize("name", ["dora", "ia3", "oft", "hira"])
def test_a_quantised_base_is_that_of_its_dequantised_weights(name):
    params, adapter = stacked_adapter(name)
    sites = jlora.trace(wide, params, jnp.ones((3, 24)))
    base = jlora.quantize(params, sites, {"layers": "int8"})
    plain = jax.jit(jlora.dequantize)(base)
    lora, errors = jlora.to_lora(adapter, base, rank=24)
    assert errors["layers"] < 1e-6
    close(jlora.merge(plain, lora), jlora.merge(plain, adapter))


def test_to_lora_keeps_lora_and_asks_for_the_base():
    adapter = toy_model.adapter()
    same, errors = jlora.to_lora(adapter)
    assert all(same[path] is update for path, update in adapter.items())
    assert set(errors.values()) == {0}
    with pytest.raises(ValueError, match="Pass params"):
        jlora.to_lora(toy_model.adapter(jlora.DoRA(2)))
