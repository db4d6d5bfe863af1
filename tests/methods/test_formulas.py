"""The formulas of methods that start from the weight or divide it, computed in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IN, OUT = 8, 12


def nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


def normal(*shape: int) -> np.ndarray:
    return np.asarray(RNG.normal(size=shape), np.float32)


W, X = normal(IN, OUT), normal(3, IN)


def program(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def new(method: jlora.Method, w: np.ndarray = W, dtype: Any = jnp.float32) -> jlora.Update:
    sites = jlora.trace(program, w, np.ones((3, len(w)), np.float32))
    return jlora.init(KEY, sites, {"": method}, params=jnp.asarray(w), dtype=dtype)[""]


def random(update: jlora.Update) -> tuple[jlora.Update, dict[str, np.ndarray]]:
    """The update with random factors, and all its arrays."""
    factors = {name: normal(*f.shape) for name, f in update.factors.items()}
    frozen = {name: np.asarray(f) for name, f in update.frozen.items()}
    return dataclasses.replace(update, factors=factors), factors | frozen


def check(update: jlora.Update, want: np.ndarray) -> None:
    """Merged and adapted, the weight is the wanted one."""
    bound = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(jlora.merge(W, {"": update}), want, atol=bound)
    np.testing.assert_allclose(jlora.adapt(program, on_dense="allow")(W, {"": update}, X), X @ want, atol=5 * bound)


def test_mica_trains_a_alone_in_the_space_of_the_last_singular_vectors() -> None:
    update = new(jlora.LoRA(3, 6.0, start="mica"))
    assert (set(update.factors), set(update.frozen), update.method.offset) == ({"a"}, {"b"}, False)
    assert not np.any(update.factors["a"])
    last = np.linalg.svd(W, full_matrices=False)[2][-3:]
    np.testing.assert_allclose(np.abs(np.sum(update.frozen["b"] * last, 1)), 1, atol=1e-5)
    update, f = random(update)
    check(update, W + 2 * f["a"] @ f["b"])


def test_either_matrix_can_be_frozen_and_not_both() -> None:
    update = new(jlora.LoRA(2, freeze_b=True))
    assert (set(update.factors), np.any(update.factors["a"]), np.all(update.frozen["b"])) == ({"a"}, False, True)
    with pytest.raises(ValueError, match="train nothing"):
        jlora.LoRA(2, freeze_a=True, freeze_b=True)
    with pytest.raises(ValueError, match="train nothing"):
        jlora.LoRA(2, freeze_a=True, start="mica")


def test_block_diagonal_factors() -> None:
    def diagonal(blocks: np.ndarray) -> np.ndarray:
        count, m, n = blocks.shape
        return np.einsum("cij,cd->cidj", blocks, np.eye(count, dtype=np.float32)).reshape(count * m, count * n)

    update, f = random(new(jlora.BDLoRA(4, 2, "out", 8.0)))
    check(update, W + 2 * f["a"].reshape(IN, 4) @ diagonal(f["b"]))
    update, f = random(new(jlora.BDLoRA(4, 2, "in", 8.0)))
    check(update, W + 2 * diagonal(f["a"]) @ f["b"].reshape(4, OUT))
    for method, words in ((jlora.BDLoRA(5, 5), "5 blocks do not divide its out"), (jlora.BDLoRA(12, 4), "above the")):
        with pytest.raises(ValueError, match=words):
            new(method)
    with pytest.raises(ValueError, match="rank 3, 6 would do"):
        jlora.BDLoRA(4, 3)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_a_multiplier_after_block_diagonal_factors(side: str, axis: str) -> None:
    update, _ = random(new(jlora.BDLoRA(4, 2, side, 8.0)))
    multiplier, f = random(new(jlora.IA3(axis)))
    want = np.asarray(jlora.merge(W, {"": update})) * (f["l"] if axis == "out" else f["l"][:, None])
    y = jlora.adapt(program, on_dense="error")(W, [{"": update}, {"": multiplier}], X)
    np.testing.assert_allclose(y, X @ want, atol=1e-4 * np.abs(want).max())


def test_rows_of_qalora_are_equal_inside_a_group() -> None:
    update, f = random(new(jlora.QALoRA(2, 4, 6.0)))
    check(update, W + 3 * np.repeat(f["a"], 4, axis=0) @ f["b"])
    with pytest.raises(ValueError, match="does not divide its in axes"):
        new(jlora.QALoRA(1, 3))


def test_kasa_replaces_the_last_triples() -> None:
    update = new(jlora.KaSA(2, 6.0))
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    dropped = (u[:, -2:] * s[-2:]) @ vt[-2:]
    check(update, W)
    assert float(jlora.kasa_penalty({"": update}, beta=0)) < 1e-8
    moved, f = random(update)
    check(moved, W - dropped + 3 * (f["a"] * f["e"]) @ f["b"])
    from_zero = new(jlora.KaSA(2, 6.0, start="zero"))
    check(from_zero, W - dropped)
    assert all(np.all(from_zero.factors[name]) for name in "ae")
    grams = f["a"].T @ f["a"], f["b"] @ f["b"].T
    want = 0.5 * np.sum(f["e"] ** 2) + 0.25 * sum(np.linalg.norm(g - np.eye(2)) for g in grams)
    assert np.allclose(jlora.kasa_penalty([{"": moved}, {}], 0.5, 0.25), want)
    gradient = jax.grad(lambda e: jlora.kasa_penalty({"": dataclasses.replace(moved, factors={**f, "e": e})}, 0.5))
    np.testing.assert_allclose(gradient(f["e"]), f["e"], rtol=1e-5)
    identity = {"a": jnp.eye(IN, 2), "e": jnp.zeros(2), "b": jnp.eye(2, OUT)}
    slope = jax.grad(lambda factors: jlora.kasa_penalty({"": dataclasses.replace(moved, factors=factors)}))(identity)
    assert not any(np.any(g) for g in slope.values())


@pytest.mark.parametrize(("in_gain", "out_gain"), [(True, True), nightly(False, True), (False, False)])
def test_psoft_rotates_the_leading_subspace(in_gain: bool, out_gain: bool) -> None:
    update, f = random(new(jlora.PSOFT(3, in_gain, out_gain)))
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(f["a"] @ f["b"], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    q = np.zeros((3, 3), np.float32)
    q[np.triu_indices(3, 1)] = f["q"]
    rotation = (np.eye(3) - (q - q.T)) @ np.linalg.inv(np.eye(3) + (q - q.T))
    middle = np.diag(f.get("g", np.ones(3))) @ rotation @ np.diag(f.get("h", np.ones(3)))
    want = W + f["a"] @ (middle - np.eye(3)) @ f["b"]
    check(update, want.astype(np.float32))
    if not out_gain:
        np.testing.assert_allclose(np.linalg.norm(want, axis=0), np.linalg.norm(W, axis=0), rtol=1e-4)


@pytest.mark.parametrize("shape", [(IN, OUT), nightly((OUT, IN)), nightly((IN, IN))])
def test_gradients_of_osf_leave_the_leading_subspace(shape: tuple[int, int]) -> None:
    w = normal(*shape)
    update = new(jlora.OSF(3), w)
    x, target = normal(5, shape[0]), normal(5, shape[1])
    u, _, vt = (a for a in np.linalg.svd(w, full_matrices=False))
    high, wide = u[:, :-3], vt[:-3]

    def loss(factors: Any) -> jax.Array:
        y = jlora.adapt(program)(w, {"": dataclasses.replace(update, factors=factors)}, x)
        return jnp.sum(jnp.square(y - target))

    f = {name: np.asarray(a) + 0.1 * normal(*a.shape) for name, a in update.factors.items()}
    gradient = jax.grad(loss)(f)
    new_w = w - (u[:, -3:] * np.linalg.svd(w)[1][-3:]) @ vt[-3:] + (f["u"] * f["s"]) @ f["v"]
    dw = 2 * x.T @ (x @ new_w - target)
    du, dv = dw @ f["v"].T * f["s"], (f["u"] * f["s"]).T @ dw
    want = {
        "u": du - high @ (high.T @ du),
        "s": np.diag(f["u"].T @ dw @ f["v"].T),
        "v": dv - (dv @ wide.T) @ wide,
    }
    for name, expected in want.items():
        np.testing.assert_allclose(gradient[name], expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    assert set(update.frozen) - {"u0", "s0", "v0"} == {(IN, OUT): {"k"}, (OUT, IN): {"h"}}.get(shape, set())


def test_adamss_updates_each_cluster_of_outputs() -> None:
    directions = np.linalg.qr(normal(IN, IN))[0][:, :2]
    clusters = np.arange(OUT) % 2
    w = (directions[:, clusters] * (3 + np.arange(OUT)) + 0.01 * normal(IN, OUT)).astype(np.float32)
    update = new(jlora.AdaMSS(2, 2, 1), w)
    members = np.asarray(update.frozen["c"])
    assert {tuple(row) for row in members} == {tuple(clusters == k) for k in (0, 1)}
    update, f = random(update)
    want = w + np.stack([f["p"] @ f["a"][:, k] @ f["b"][:, o] for o, k in enumerate(members.argmax(0))], 1)
    np.testing.assert_allclose(jlora.merge(w, {"": update}), want, atol=1e-4)
    with pytest.raises(ValueError, match="more than its 12 outputs"):
        new(jlora.AdaMSS(2, 13))


@pytest.mark.parametrize(
    ("gain", "shift"),
    [("vector", "lora"), ("lora", "vector"), nightly("constant", "constant"), nightly("none", "lora")],
)
def test_gains_and_shifts_of_glora(gain: str, shift: str) -> None:
    update, f = random(new(jlora.GLoRA(2, gain, shift)))
    multiplier = f["ga"] @ f["gb"] if gain == "lora" else f.get("g", 0)
    added = f["a"] @ f["b"] if shift == "lora" else f.get("h", 0)
    check(update, W + W * multiplier + added)
    half = jlora.merge(W, jlora.scale({"": update}, 0.5))
    np.testing.assert_allclose(half, W + 0.5 * (W * multiplier + added), atol=1e-4)
    if gain == "none":
        with pytest.raises(ValueError, match="train nothing"):
            jlora.GLoRA(2, "none", "none")


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (jlora.RoAd, {"group": 1}, r"pairs: 2 would do, not 1"),
        (jlora.SuperTuning, {"alpha": 2.0}, "no LoRA that it scales: set a rank"),
        (jlora.PSOFT, {"rank": 1, "in_gain": False, "out_gain": False}, "would train nothing: raise the rank"),
    ],
)
def test_hyper_parameters_that_have_no_effect_raise(method: type, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        method(**options)


def test_deft_starts_at_the_base_for_factors_of_few_bits() -> None:
    """R is that of the rounded P."""
    update = new(jlora.DEFT(2, projection="qr"), W, jnp.bfloat16)
    p = np.asarray(update.factors["p"], np.float64)
    np.testing.assert_allclose(
        np.asarray(update.factors["r"], np.float64), W @ np.linalg.pinv(p), rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("method", [jlora.FRoD(), jlora.OSF(3), jlora.KaSA(3, 5.0, offset=True)])
def test_arrays_of_16_bits_that_come_from_the_weight_start_at_the_base(method):
    """Although they are rounded: what they add is a difference of equal products."""
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
    adapter = jlora.init(jax.random.key(1), sites, method, params=params, dtype=jnp.bfloat16)
    np.testing.assert_allclose(jlora.merge(params, adapter)["w"], params["w"], atol=1e-6)
