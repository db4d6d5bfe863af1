"""Training of many adapters in one program: each member as in a run of its own."""

from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import toy_model

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Optax raises a Python float to an integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = toy_model.params()
BATCHES = jnp.stack([(jnp.arange(10).reshape(2, 5) * k + k) % 11 for k in (1, 2, 3)])
RATES = {"a": 1e-2, "b": 3e-2, "c": 1e-3}
DECAYS = {"a": 0.1, "b": 0.0, "c": 0.3}
COUNTS = {"a": 0.5, "b": 100.0, "c": 0.01}


def loss(params: Any, tokens: jax.Array) -> jax.Array:
    return (toy_model.model(params, tokens) ** 2).mean()


def members() -> dict[str, Any]:
    a, b = (toy_model.adapter(jlora.LoRA(rank, alpha=3.0), rank) for rank in (2, 3))
    return {
        "a": a,
        "b": b,
        "c": {path: update for path, update in toy_model.adapter(seed=5).items() if path != "embed"},
    }


def clipped(learning_rate: Any, weight_decay: Any, max_norm: Any) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(max_norm)  # eps is large: Adam divides rounding errors by small gradients
    return optax.chain(clip, optax.adamw(learning_rate, weight_decay=weight_decay, eps=1e-3))


def optimiser() -> Any:
    values = [jnp.array(list(per.values())) for per in (RATES, DECAYS, COUNTS)]
    names = ("learning_rate", "weight_decay", "max_norm")
    return jlora.bank.optimiser(clipped, **dict(zip(names, values, strict=True)))


def make_step(tx: Any) -> Any:
    @jax.jit
    def step(bank: Any, state: Any, batches: Any) -> Any:
        gradient = jax.grad(lambda bank: jlora.bank.vmap(loss)(PARAMS, bank, batches).sum())(bank)
        updates, state = tx.update(gradient, state, bank)
        return optax.apply_updates(bank, updates), state

    return step


def alone(name: str, adapter: Any, batch: Any, steps: int) -> Any:
    tx: Any = optax.masked(clipped(RATES[name], DECAYS[name], COUNTS[name]), jlora.mask)
    state = tx.init(adapter)

    @jax.jit
    def step(adapter: Any, state: Any) -> Any:
        gradient = jax.grad(lambda adapter: jlora.adapt(loss)(PARAMS, adapter, batch))(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(steps):
        adapter, state = step(adapter, state)
    return adapter


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for path in one:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one[path].factors, other[path].factors
        )


def test_together_is_alone() -> None:
    """Ranks, targets, learning rates, weight decays and clipping differ; all members equal runs of their own."""
    bank = jlora.bank.stack(members())
    tx = optimiser()
    state, step = tx.init(bank), make_step(tx)
    for _ in range(4):
        bank, state = step(bank, state, BATCHES)
    for k, (name, adapter) in enumerate(members().items()):
        assert_same(bank[name], alone(name, adapter, BATCHES[k], 4))


def test_a_poisoned_member_harms_no_other() -> None:
    """A member that is NaN leaves values, moments and step counts of the others as they are."""
    bank = jlora.bank.stack(members())
    tx = optimiser()
    poisoned = jax.tree.map(lambda a: a.at[1].set(jnp.nan), bank)
    results = []
    for start in (bank, poisoned):
        state, step, current = tx.init(bank), make_step(tx), start
        for _ in range(3):
            current, state = step(current, state, BATCHES)
        results.append((current.adapter, state))
    for k in (0, 2):
        one, other = (jax.tree.map(lambda a, k=k: a[k], result) for result in results)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert all(np.isnan(u.factors["b"][1]).all() for u in results[1][0].values())


def test_retired_members_stay_and_the_others_go_on() -> None:
    bank = jlora.bank.stack(members())
    tx = optimiser()
    state, step = tx.init(bank), make_step(tx)
    bank, state = step(bank, state, BATCHES)
    state = jlora.bank.retire(state, bank, "b")
    before = bank["b"]
    for _ in range(2):
        bank, state = step(bank, state, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, before, bank["b"])
    assert_same(bank["a"], alone("a", members()["a"], BATCHES[0], 3))
    assert step._cache_size() == 1


def test_a_restarted_member_trains_from_its_new_start() -> None:
    bank = jlora.bank.stack(members())
    tx = optimiser()
    state, step = tx.init(bank), make_step(tx)
    for _ in range(2):
        bank, state = step(bank, state, BATCHES)
    fresh = toy_model.adapter(jlora.LoRA(1), 9)
    bank, state = jlora.bank.restart(tx, jlora.bank.retire(state, bank, "b"), bank, "b", fresh)
    for _ in range(2):
        bank, state = step(bank, state, BATCHES)
    assert_same(bank["b"], alone("b", fresh, BATCHES[1], 2))
    assert_same(bank["a"], alone("a", members()["a"], BATCHES[0], 4))
    assert step._cache_size() == 1


def test_a_transformation_for_all() -> None:
    bank = jlora.bank.stack(members())
    tx: Any = jlora.bank.optimiser(optax.adam(1e-2))
    state, step = tx.init(bank), make_step(tx)
    bank, state = step(bank, state, BATCHES)
    want = members()["a"]
    gradient = jax.grad(lambda a: jlora.adapt(loss)(PARAMS, a, BATCHES[0]))(want)
    for path, update in want.items():
        for name, value in update.factors.items():
            g = gradient[path].factors[name]
            want_value = value - 1e-2 * g / (jnp.abs(g) + 1e-8)
            np.testing.assert_allclose(bank["a"][path].factors[name], want_value, rtol=1e-3, atol=1e-4)


def test_dropout_of_a_bank() -> None:
    """Keys are split over members inside the loss: no two share a mask, and each is that of its own key."""
    adapter = toy_model.adapter(jlora.LoRA(2, dropout=0.5))
    bank, keys = jlora.bank.stack({"a": adapter, "b": adapter}), jax.random.split(jax.random.key(0), 2)

    def fun(params: Any, adapter: Any, key: Any) -> Any:
        return jlora.adapt(toy_model.model)(params, jlora.with_dropout(adapter, key), toy_model.tokens())

    out = jax.vmap(fun, (None, 0, 0))(PARAMS, bank.adapter, keys)
    for k in range(2):
        np.testing.assert_allclose(out[k], fun(PARAMS, adapter, keys[k]), rtol=2e-5, atol=2e-5)
    assert np.abs(out[0] - out[1]).max() > 1e-3


def test_calls_that_do_not_fit() -> None:
    bank = jlora.bank.stack(members())
    with pytest.raises(TypeError, match="tx is a transformation already"):
        jlora.bank.optimiser(optax.adam(1e-3), learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"learning_rate has shape \(2,\); expected a number, or \(3,\)"):
        jlora.bank.optimiser(optax.adam, learning_rate=jnp.ones(2)).init(cast(Any, bank))
    tx: Any = jlora.bank.optimiser(optax.adam(1e-3))
    with pytest.raises(TypeError, match="takes a bank, found dict"):
        tx.init(bank.adapter)
    with pytest.raises(TypeError, match="found NoneType"):
        tx.update(bank, tx.init(bank))
    with pytest.raises(KeyError, match="no adapter 'x'"):
        jlora.bank.retire(tx.init(bank), bank, "x")
