"""Ranks: what the methods reach, what is left of them, and how AdaLoRA's budget shares them out."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import toy_model

KEY = jax.random.key(0)


def update_of(method: jlora.Method, m: int, n: int, seed: int = 0) -> np.ndarray:
    """The update of one `(m, n)` kernel, with Gaussian factors."""
    with jax.enable_x64(True):
        params = {"w": jnp.zeros((m, n), jnp.float64)}
        sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.zeros((1, m), jnp.float64))
        adapter = jlora.init(KEY, sites, {"w": method}, params=params, dtype=jnp.float64)
        rng = np.random.default_rng(seed)
        adapter = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), adapter)
        return np.asarray(jlora.merge(params, adapter)["w"])


def expanded(m: int, n: int, part: int, k: int) -> int:
    """Of a product of k additive terms, each of width `part`."""
    return min(m, n, 2 * part + (2**k - 2) * part**2)


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("method", "m", "n", "rank"),
    [
        (jlora.LoRA(5), 40, 60, 5),
        (jlora.LoRA(5, 3.0, rank_stabilized=True), 40, 60, 5),
        (jlora.Additive(5), 40, 60, 10),
        (jlora.Hadamard(6, 2), 40, 60, 9),
        (jlora.Hadamard(9, 3), 40, 60, 27),
        (jlora.Hadamard(16, 2), 40, 60, 40),
        (jlora.Hadamard(16, 4), 768, 1024, 256),
        (jlora.Hadamard(4, 2, "additive"), 40, 60, expanded(40, 60, 2, 2)),
        (jlora.Hadamard(8, 2, "additive"), 80, 120, expanded(80, 120, 4, 2)),
        (jlora.Hadamard(6, 3, "additive"), 80, 120, expanded(80, 120, 2, 3)),
        (jlora.Hadamard(3, 1, "tanh"), 100, 100, 100),
        (jlora.Hadamard(3, 1, "sigmoid"), 100, 100, 100),
        (jlora.LoHa(3), 40, 60, 9),
        (jlora.MiSS(5), 40, 60, 5),
        (jlora.VeRA(7), 40, 60, 7),
        (jlora.AdaLoRA(5), 40, 60, 5),
        (jlora.RandLoRA(8), 40, 60, 40),
    ],
    ids=str,
)
def test_the_rank_of_an_update(method, m, n, rank):
    assert np.linalg.matrix_rank(update_of(method, m, n)) == rank


@pytest.mark.nightly
def test_the_rank_of_a_product_of_eleven_additive_terms():
    assert np.linalg.matrix_rank(update_of(jlora.Hadamard(11, 11, "additive"), 2048, 2048)) == 2048


def test_a_truncation_keeps_the_leading_ranks_at_the_same_scale():
    adapter = toy_model.adapter(jlora.LoRA(4, 3.0, rank_stabilized=True))
    cut = jlora.truncate(adapter, 2)
    for path, update in adapter.items():
        ranks = (jnp.arange(4) < 2).astype(jnp.float32)
        masked = dataclasses.replace(update, factors={**update.factors, "a": update.factors["a"] @ jnp.diag(ranks)})
        want = jlora.merge(toy_model.params(), {path: masked})
        got = jlora.merge(toy_model.params(), {path: cut[path]})
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)
        assert vars(cut[path].method)["rank"] == 2
    assert jlora.truncate(adapter, 9)["mix/kernel"].factors["a"].shape == (8, 4)
    with pytest.raises(ValueError, match="rank must be a positive integer, not 0"):
        jlora.truncate(adapter, 0)
    with pytest.raises(ValueError, match="this adapter has Full"):
        jlora.truncate(toy_model.adapter(jlora.Full()), 1)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("shape", [(3, 9, 14), (3, 14, 9), (8, 8)])
@pytest.mark.parametrize("cut", [{"rank": 4}, {"energy": 0.9}, {"energy": 1 - 1e-12}, {"rank": 9}, {}], ids=str)
def test_a_truncation_and_its_error_are_those_of_an_svd(shape, cut):
    """Of a matrix whose singular values fall to 1e-9, so that small errors are exact too."""
    rng, count = np.random.default_rng(0), min(shape[-2:])
    left, right = (np.linalg.qr(rng.normal(size=(*shape[:-2], n, count)))[0] for n in shape[-2:])
    matrix = np.float32(left * np.geomspace(1, 1e-9, count) @ right.swapaxes(-1, -2))
    sites = jlora.trace(lambda p, x: x @ p["w"], {"w": matrix}, np.zeros((*shape[:-2], 1, shape[-2]), np.float32))
    update = dataclasses.replace(jlora.init(KEY, sites, jlora.Full())["w"], factors={"d": jnp.asarray(matrix)})
    lora, errors = jlora.to_lora({"w": update}, **cut, tolerance=1e-2)

    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    tails = np.sqrt(np.cumsum(s[..., ::-1] ** 2, -1)[..., ::-1] / (s**2).sum(-1, keepdims=True))
    tails = np.append(tails.reshape(-1, count).max(0)[1:], 0)
    allowed = np.sqrt(1 - cut["energy"]) if "energy" in cut else 1e-2
    rank = min(cut["rank"], count) if "rank" in cut else int(np.argmax(tails <= allowed)) + 1
    assert cast(jlora.LoRA, lora["w"].method).rank == rank
    np.testing.assert_allclose(errors["w"], tails[rank - 1], rtol=1e-6, atol=0)
    nearest = u[..., :rank] * s[..., None, :rank] @ vt[..., :rank, :]
    np.testing.assert_allclose(jlora.merge({"w": 0 * matrix}, lora)["w"], nearest, atol=1e-6)


def test_a_rank_is_drawn_for_every_step():
    params, x = toy_model.params(), toy_model.tokens()
    adapter = toy_model.adapter(jlora.LoRA(4, 3.0))
    cuts = [jlora.adapt(toy_model.model)(params, jlora.truncate(adapter, b), x) for b in (1, 2, 3, 4)]

    @jax.jit
    def f(adapter, key):
        return jlora.adapt(toy_model.model)(params, jlora.with_rank(adapter, key), x)

    seen = set()
    for k in range(24):
        y = f(adapter, jax.random.key(k))
        gaps = [float(jnp.abs(y - cut).max()) for cut in cuts]
        assert min(gaps) < 1e-5
        seen.add(gaps.index(min(gaps)))
    assert seen == {0, 1, 2, 3}
    grads = jax.grad(lambda a: toy_model.loss(f(a, jax.random.key(3))))(adapter)
    assert not any(jnp.isnan(g).any() for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="this adapter has Full"):
        jlora.with_rank(toy_model.adapter(jlora.Full()), KEY)


def test_adalora_ends_with_the_target_rank_where_it_matters():
    params = {"plain": jnp.zeros((12, 12)), "busy": jnp.zeros((3, 12, 12))}
    x = jax.random.normal(KEY, (3, 64, 12))
    goal = jax.random.normal(jax.random.key(1), (3, 12, 12))

    def f(p, x):
        return x @ p["plain"], jnp.einsum("lbi,lio->lbo", x, p["busy"])

    adapter = jlora.init(KEY, jlora.trace(f, params, x), jlora.AdaLoRA(4))

    def loss(adapter):
        plain, busy = jlora.adapt(f)(params, adapter, x)
        fit = jnp.mean(jnp.square(busy - jnp.einsum("lbi,lio->lbo", x, goal))) + jnp.mean(jnp.square(plain))
        return fit + 1e-3 * jlora.orthogonality(adapter)

    tx = jlora.rank_budget(optax.adam(3e-2), target_rank=2, total_steps=60, warmup=10, final=20, interval=3)
    state = tx.init(cast(optax.Params, adapter))

    @jax.jit
    def step(adapter, state):
        gradients = jax.grad(loss)(adapter)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state

    left = []
    for _ in range(60):
        adapter, state = step(adapter, state)
        left.append(sum(int(jnp.sum(keep)) for keep in state.keep))
    assert left[:10] == [16] * 10
    assert left == sorted(left, reverse=True)
    assert left[-20:] == [8] * 20
    ranks = {path: int(jnp.sum(update.factors["e"] != 0)) for path, update in adapter.items()}
    assert ranks["busy"] + ranks["plain"] == 8
    assert ranks["busy"] > ranks["plain"] * 3


def test_a_budget_that_cannot_be():
    with pytest.raises(ValueError, match="leave no step of 10"):
        jlora.rank_budget(optax.sgd(1.0), target_rank=2, total_steps=10, warmup=6, final=4)
    with pytest.raises(ValueError, match="the parameters have none"):
        jlora.rank_budget(optax.sgd(1.0), target_rank=2, total_steps=10).init(toy_model.adapter())
