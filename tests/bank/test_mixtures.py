"""`jlora.bank.mix`: rows with different mixtures of adapters, against merging what each row's mixture adds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.agreement import close

PARAMS, TOKENS = toy_model.params(), toy_model.tokens()
WEIGHTS = jnp.asarray([[0.7, -0.2, 0.5], [0.0, 0.0, 0.0]])
PATHS = ("layers/up", "layers/down", "mix/kernel")


def bank() -> jlora.bank.Bank:
    """Members that differ in rank, scale and targets."""
    sites = toy_model.sites()
    targets = [
        {".*(up|down|kernel)": jlora.LoRA(2, 3.0)},
        {"layers/up": jlora.LoRA(1), "mix/kernel": jlora.LoRA(3, rank_stabilized=True, alpha=2.0)},
        {".*down": jlora.LoRA(2)},
    ]
    members = [toy_model.random_adapter(sites, target, seed) for seed, target in enumerate(targets)]
    return jlora.bank.stack(dict(zip("abc", members, strict=True)))


def merged(bank: jlora.bank.Bank, weights: Any) -> Any:
    """W + sum_k c_k (merge(W, member_k) - W)."""
    changes = [jax.tree.map(jnp.subtract, jlora.merge(PARAMS, bank[name]), PARAMS) for name in bank]
    return jax.tree.map(lambda w, *d: w + sum(c * x for c, x in zip(weights, d, strict=True)), PARAMS, *changes)


def test_rows_have_their_own_mixtures():
    members = bank()
    got = jax.jit(jlora.bank.mix(toy_model.model))(PARAMS, members, WEIGHTS, TOKENS)
    for row, weights in enumerate(WEIGHTS):
        close(got[row], toy_model.model(merged(members, weights), TOKENS[row : row + 1])[0], 1e-4)


def test_one_mixture_is_an_adapter():
    members = bank()
    adapter = jlora.bank.mixture(members, WEIGHTS[0])
    assert set(adapter) == set(PATHS)
    jax.tree.map(lambda x, y: close(x, y, 1e-6), jlora.merge(PARAMS, adapter), merged(members, WEIGHTS[0]))


def test_weights_of_each_layer():
    members = bank()
    per_layer = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    weights = {"layers/up": per_layer, "layers/down": WEIGHTS[0], "mix/kernel": WEIGHTS[1]}
    got = jlora.merge(PARAMS, jlora.bank.mixture(members, weights))
    for layer in range(3):
        want = merged(members, per_layer[layer])["layers"]["up"][layer]
        close(got["layers"]["up"][layer], want, 1e-6)
    assert np.array_equal(got["mix"]["kernel"], PARAMS["mix"]["kernel"])


def test_gradients_reach_the_weights_and_the_factors_but_no_scales():
    members = bank()

    def loss(bank: jlora.bank.Bank, weights: jax.Array) -> jax.Array:
        return toy_model.loss(jlora.bank.mix(toy_model.model)(PARAMS, bank, weights, TOKENS[:1]))

    by_merging = jax.grad(lambda weights: toy_model.loss(toy_model.model(merged(members, weights), TOKENS[:1])))
    of_bank, of_weights = jax.jit(jax.grad(loss, (0, 1)))(members, WEIGHTS[:1])
    close(of_weights[0], by_merging(WEIGHTS[0]), 1e-4)
    update = of_bank.adapter["layers/up"]
    assert np.any(np.asarray(update.factors["b"]))
    assert not np.any(np.asarray(update.rank_mask))
    assert not np.any(np.asarray(update.traced_scale))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:1], r"2 rows, and the weights the first axes \[\(1,\)\]"),
        (WEIGHTS[:, :2], r"layers/\w+: the weights of one row have the shape \(2,\), expected \(3,\) or \(3, 3\)"),
        ({"layers/up": WEIGHTS}, "other paths than the bank"),
    ],
    ids=["rows", "members", "paths"],
)
def test_weights_that_do_not_fit(weights: Any, message: str):
    with pytest.raises(ValueError, match=message):
        jlora.bank.mix(toy_model.model)(PARAMS, bank(), weights, TOKENS)


def test_a_method_without_ranks_to_weigh():
    scaled = jlora.bank.stack({"a": toy_model.random_adapter(toy_model.sites(), {"layers/up": jlora.IA3()})})
    with pytest.raises(ValueError, match=r"layers/up has IA3\(\) in the bank, and mixtures are of LoRA"):
        jlora.bank.mixture(scaled, jnp.ones(1))


def attend(params: Any, x: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
    """Causal attention (tokens, width) with the keys and values of earlier tokens in a cache."""
    q, k, v = (x @ params[name] for name in ("q", "k", "v"))
    k, v = (k, v) if cache is None else (jnp.concatenate([cache[0], k]), jnp.concatenate([cache[1], v]))
    before = len(k) - len(q)
    visible = jnp.arange(len(k))[None] <= jnp.arange(len(q))[:, None] + before
    return jax.nn.softmax(jnp.where(visible, q @ k.T, -jnp.inf)) @ v, (k, v)


def test_an_adapter_from_a_token_on():
    """Activated LoRA: tokens before the invocation have the base's projections, the others the adapter's."""
    rng = np.random.default_rng(2)
    params = {name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for name in "qkv"}
    x, start = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), 3
    adapter = toy_model.random_adapter(jlora.trace(attend, params, x), {"[qkv]": jlora.LoRA(2)})
    _, cache = attend(params, x[:start])
    got, _ = jlora.adapt(attend)(params, adapter, x[start:], cache)
    merged = {name: np.asarray(w, np.float64) for name, w in jlora.merge(params, adapter).items()}
    base = {name: np.asarray(w, np.float64) for name, w in params.items()}
    q, k, v = (np.concatenate([x[:start] @ base[name], x[start:] @ merged[name]]) for name in "qkv")
    for t in range(start, len(x)):
        scores = np.exp(q[t] @ k[: t + 1].T)
        close(got[t - start], scores / scores.sum() @ v[: t + 1], 1e-4)
