"""Arrays that all weights of an adapter share: once in memory, in files and in the optimiser, and what they add."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from tests.support.agreement import check_law
from tests.support.checkpoints import same

METHODS = {
    "v": jlora.TinyLoRA(2, 3),
    "bank": jlora.VBLoRA(2, 5, 3, offset=False),
    "theta": jlora.UniLoRA(2, 7, offset=False),
}
EACH = pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(n, m, id=n, marks=[] if n == "v" else [pytest.mark.nightly]) for n, m in METHODS.items()],
)
NORMAL = np.random.default_rng(0).normal
PARAMS = {"down": jnp.asarray(NORMAL(size=(6, 4)), jnp.float32), "up": jnp.asarray(NORMAL(size=(3, 4, 6)), jnp.float32)}
X = jnp.asarray(NORMAL(size=(5, 4)), jnp.float32)
KEY = jax.random.key(0)


def model(params: Any, x: jax.Array) -> jax.Array:
    layers = jax.lax.scan(lambda x, w: (x, jnp.tanh(x @ w)), x, params["up"])[1]
    return layers.mean(0) @ params["down"]


SITES = jlora.trace(model, PARAMS, X)


def new(method: jlora.Method, key: jax.Array = KEY) -> jlora.Adapter:
    return jlora.init(key, SITES, method, params=PARAMS)


def moved(adapter: jlora.Adapter) -> jlora.Adapter:
    """The adapter as if it were trained."""
    rng = np.random.default_rng(1)

    def move(array: jax.Array) -> jax.Array:
        return array + np.asarray(0.5 * rng.normal(size=array.shape), array.dtype)

    return {p: dataclasses.replace(u, factors=jax.tree.map(move, u.factors)) for p, u in sorted(adapter.items())}


@EACH
def test_a_shared_array_is_one_leaf_whose_gradient_is_the_sum_over_all_weights(name, method):
    adapter = moved(new(method))
    assert [name in adapter[path].factors for path in ("down", "up")] == [True, False]
    check_law(model, PARAMS, adapter, X)

    def loss(adapter: jlora.Adapter) -> jax.Array:
        return jnp.sin(jlora.adapt(model)(PARAMS, adapter, X)).sum()

    gradient, apart = jax.jit(jax.grad(loss))(adapter), jax.jit(jax.grad(loss))(jlora.untie(adapter))
    total = sum(apart[path].factors[name] for path in adapter)
    np.testing.assert_allclose(gradient["down"].factors[name], total, atol=1e-5)
    size = adapter["down"].factors[name].size
    state: Any = optax.sgd(1.0, momentum=0.9).init(adapter)  # pyright: ignore[reportArgumentType]
    assert sum(leaf.size == size for leaf in jax.tree.leaves(state)) == sum(
        leaf.size == size for leaf in jax.tree.leaves(adapter)
    )
    assert jlora.summary(adapter, PARAMS).numbers == sum(f.size for u in adapter.values() for f in u.factors.values())


@EACH
def test_an_adapter_whose_holder_is_missing_says_what_to_do(name, method, tmp_path):
    adapter = moved(new(method))
    part = {"up": adapter["up"]}
    for use in (
        lambda: jlora.merge(PARAMS, part),
        lambda: jlora.adapt(model)(PARAMS, part, X),
        lambda: jlora.to_lora(part, PARAMS),
        lambda: jlora.summary(part, PARAMS),
        lambda: jlora.bank.stack({"a": part}),
        lambda: jlora.combine([part], params=PARAMS),
        lambda: jlora.peft.save(tmp_path / "peft", part, {"up": "up"}),
    ):
        with pytest.raises(ValueError, match=rf"up shares {name}.* no update of the adapter holds them.*jlora.untie"):
            use()
    alone = {"up": jlora.untie(adapter)["up"]}
    np.testing.assert_allclose(
        jlora.merge(PARAMS, alone)["up"], jlora.merge(PARAMS, adapter)["up"], atol=1e-6
    )  # what was taken out by `untie` stands alone


def test_two_adapters_put_together_are_ambiguous_until_they_are_untied():
    first, second = moved(new(METHODS["v"])), new(METHODS["v"], jax.random.key(1))
    mixed = {"down": first["down"], "side": second["down"], "up": second["up"]}
    with pytest.raises(ValueError, match="down and side both hold some"):
        jlora.untie(mixed)


def test_groups_do_not_share():
    targets = {"up": jlora.TinyLoRA(2, 3, group="a"), "down": jlora.TinyLoRA(2, 3, group="b")}
    adapter = jlora.init(KEY, SITES, targets, params=PARAMS)
    assert all("v" in update.factors for update in adapter.values())


@pytest.mark.nightly
@EACH
def test_checkpoints_and_restarts_keep_an_array_shared(name, method, tmp_path):
    adapter = moved(new(method))
    jlora.save(tmp_path / "adapter", adapter)
    same(jlora.load(tmp_path / "adapter"), adapter)
    _, again = jlora.restart(KEY, SITES, PARAMS, adapter)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    placed = jax.device_put(adapter, jlora.shardings(adapter, PARAMS))
    np.testing.assert_array_equal(placed["down"].factors[name], adapter["down"].factors[name])
    half, whole = jlora.merge(PARAMS, jlora.scale(adapter, 0.5)), jlora.merge(PARAMS, adapter)
    np.testing.assert_allclose(2 * (half["up"] - PARAMS["up"]), whole["up"] - PARAMS["up"], atol=1e-5)


@pytest.mark.nightly
@EACH
def test_a_bank_holds_a_shared_array_once_for_each_member(name, method):
    members = {"a": moved(new(method)), "b": jlora.scale(moved(moved(new(method, jax.random.key(3)))), 0.5)}
    bank = jlora.bank.stack(members | {"none": {}})
    assert name not in bank.adapter["up"].factors
    assert bank.adapter["down"].factors[name].shape == (3, *members["a"]["down"].factors[name].shape)
    x = X[:, None]
    out = jlora.bank.apply(model)(PARAMS, bank, bank.ids(["a", "b", None, "none", "a"]), x)
    want = [jlora.adapt(model)(PARAMS, members[k], X) if k else model(PARAMS, X) for k in ("a", "b", None, None, "a")]
    np.testing.assert_allclose(out[:, 0], [y[i] for i, y in enumerate(want)], atol=1e-5)
    same(jax.tree.map(jnp.asarray, bank["a"]), members["a"])
    replaced = bank.replace("none", members["a"])
    np.testing.assert_array_equal(replaced["none"]["down"].factors[name], members["a"]["down"].factors[name])
    part = {"up": jlora.untie(members["a"])["up"]}
    with pytest.raises(ValueError, match=r"part has no update for down.* must adapt the same weights"):
        jlora.bank.stack(members | {"part": part})


@pytest.mark.nightly
@EACH
def test_adapters_with_shared_arrays_are_combined_and_converted(name, method):
    adapter = moved(new(method))
    twice, _ = jlora.combine([adapter, adapter], params=PARAMS)
    plain, _ = jlora.to_lora(adapter, PARAMS)
    for path, weight in PARAMS.items():
        change = jlora.merge(PARAMS, adapter)[path] - weight
        np.testing.assert_allclose(jlora.merge(PARAMS, twice)[path] - weight, 2 * change, atol=2e-5)
        np.testing.assert_allclose(jlora.merge(PARAMS, plain)[path] - weight, change, atol=2e-5)


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.nightly
def test_modules_share_one_variable():
    plain = Pair(nnx.Rngs(0))
    module: Any = jlora.nnx.adapt(plain, jlora.VBLoRA(2, 5, 3), X, rngs=nnx.Rngs(1))
    factors = [module.up.kernel_lora.update.factors, module.down.kernel_lora.update.factors]
    assert factors[0]["bank"] is factors[1]["bank"]
    assert len(jax.tree.leaves(nnx.state(module, nnx.LoRAParam))) == 5
    merged = jlora.nnx.merge(module)
    np.testing.assert_allclose(module(X), merged(X), atol=1e-5)
    np.testing.assert_allclose(module.up(X), merged.up(X), atol=1e-5)
    adapter = jlora.nnx.adapter(module)
    assert ["bank" in adapter[path].factors for path in sorted(adapter)] == [True, False]
    jlora.nnx.set_adapter(module, moved(adapter))
    np.testing.assert_allclose(module(X), jlora.nnx.adapt(plain, moved(adapter))(X), atol=1e-6)


def test_tinylora_is_its_formula():
    adapter = moved(new(METHODS["v"]))
    v = np.asarray(adapter["down"].factors["v"])
    for path, weight in PARAMS.items():
        u, s, vt = np.linalg.svd(np.asarray(weight, np.float64), full_matrices=False)
        p = np.asarray(adapter[path].frozen["p"])
        a, b = adapter[path].frozen["a"], adapter[path].frozen["b"]
        np.testing.assert_allclose(a @ b, (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :], atol=1e-5)
        want = weight + a @ np.einsum("k,...kij->...ij", v, p) @ b
        np.testing.assert_allclose(jlora.merge(PARAMS, adapter)[path], want, atol=1e-5)


def test_vblora_is_its_formula():
    adapter = moved(new(METHODS["bank"]))
    bank = np.asarray(adapter["down"].factors["bank"])

    def pieces(logits: np.ndarray) -> np.ndarray:
        places = np.argsort(-logits, axis=-1)[..., :2]
        weights = np.exp(np.take_along_axis(logits, places, -1))
        return ((weights / weights.sum(-1, keepdims=True))[..., None] * bank[places]).sum(-2)

    for path, (n_in, n_out) in {"down": (6, 4), "up": (4, 6)}.items():
        a, b = (np.asarray(adapter[path].factors[name]) for name in ("a", "b"))
        a = np.moveaxis(pieces(a), -2, -1)  # (*stack, pieces, length, rank)
        a = a.reshape(*a.shape[:-3], -1, 2)[..., :n_in, :]
        b = pieces(b)
        b = b.reshape(*b.shape[:-2], -1)[..., :n_out]
        np.testing.assert_allclose(jlora.merge(PARAMS, adapter)[path], PARAMS[path] + a @ b, atol=1e-5)


def test_unilora_keeps_lengths():
    """With one column and one row the change of a weight shows the factors: theta is mapped to them by an isometry."""
    params = {name: jnp.zeros(shape) for name, shape in {"column": (8, 1), "row": (1, 8)}.items()}

    def program(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["column"] @ params["row"]

    adapter = jlora.init(KEY, jlora.trace(program, params, jnp.ones((2, 8))), jlora.UniLoRA(1, 3, offset=False))
    theta = jnp.asarray([1.0, 2.0, -3.0])
    holder = dataclasses.replace(adapter["column"], factors={"theta": theta})
    merged = jlora.merge(params, adapter | {"column": holder})
    n = np.asarray(adapter["column"].frozen["norm"])
    # A B of each: 8 entries of theta n, times one; the number of uses is 1 / n^2, 18 in all.
    np.testing.assert_allclose((1 / n**2).sum(), 18, rtol=1e-5)
    products = np.outer(theta * n, theta * n).reshape(-1)
    for value in np.concatenate([merged["column"].reshape(-1), merged["row"].reshape(-1)]):
        assert np.abs(products - value).min() < 1e-5
    narrow = jlora.merge(params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), adapter | {"column": holder}))
    np.testing.assert_allclose(narrow["row"], merged["row"], rtol=0.05)  # the same indices


def test_weights_share_whichever_of_their_layers_are_updated():
    targets = {"up": jlora.VBLoRA(2, 5, 3, layers=slice(1, 3)), "down": jlora.VBLoRA(2, 5, 3)}
    adapter = jlora.init(KEY, SITES, targets)
    assert ["bank" in adapter[path].factors for path in ("down", "up")] == [True, False]
    assert jlora.merge(PARAMS, adapter)["up"].shape == PARAMS["up"].shape
