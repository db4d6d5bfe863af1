"""One batch, many adapters: every row equals that of its own adapter."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora
from jlora.bank.blocks import count_blocks
from tests.support import toy_model
from tests.support.compiled import memory
from tests.support.methods import fitting, some
from tests.support.weight_uses import KINDS


def mlp(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {
    "up": np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32),
    "down": np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32),
}


@functools.cache
def bank_of(method: Any, count: int = 3) -> jlora.bank.Bank:
    """Members with random factors, and one that has no update for `down` unless the weights share arrays."""
    sites = jlora.trace(mlp, PARAMS, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    targets = {path: fitting(method, sites[path]) if isinstance(method, str) else method for path in sites.adaptable}
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, targets, params=PARAMS))
    members = {f"member {k}": toy_model.nonzero(shapes, k) for k in range(count)}
    if not any(update.method.shared_arrays for update in shapes.values()):
        del members["member 1"]["down"]
    return jlora.bank.stack(members, params=PARAMS)


def by_row(fun: Any, params: Any, bank: jlora.bank.Bank, names: list[str | None], x: Any) -> Any:
    """The result of every row, computed alone with its own adapter."""
    rows = [
        fun(params if name is None else jlora.merge(params, bank[name]), x[i : i + 1]) for i, name in enumerate(names)
    ]
    return jnp.concatenate(rows)


NAMES = ["member 2", None, "member 0", "member 1", "member 2", "member 2", None, "member 0", "member 0", "member 2"]


@pytest.mark.parametrize("name", some("rows", "lora", "dora", "ia3"))
def test_methods(name: str) -> None:
    """Every method, gathered for each row and for blocks, the base among the rows."""
    bank, x = bank_of(name), np.random.default_rng(3).normal(size=(10, 6)).astype(np.float32)
    want = by_row(mlp, PARAMS, bank, NAMES, x)
    for block in (1, 3):
        apply = jax.jit(jlora.bank.apply(mlp, block=block, on_dense="allow"))
        np.testing.assert_allclose(apply(PARAMS, bank, bank.ids(NAMES), x), want, rtol=1e-4, atol=1e-4)


@functools.cache
def compiled(block: int) -> Any:
    return jax.jit(jlora.bank.apply(mlp, block=block))


@settings(deadline=None)
@given(st.lists(st.integers(-1, 2), min_size=8, max_size=8), st.sampled_from([1, 3, 8]))
def test_any_ids_and_blocks(ids: list[int], block: int) -> None:
    """Against the three members and the base on all rows."""
    bank, x = bank_of(jlora.LoRA(2, alpha=3.0)), np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
    all_rows = [mlp(jlora.merge(PARAMS, bank[name]), x) for name in bank] + [mlp(PARAMS, x)]
    want = np.stack(all_rows)[np.array(ids), np.arange(8)]
    np.testing.assert_allclose(compiled(block)(PARAMS, bank, np.array(ids), x), want, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6))
def test_the_number_of_blocks_is_enough(rows: int, size: int, kinds: int, seed: int) -> None:
    counts = np.bincount(np.random.default_rng(seed).integers(0, kinds, rows), minlength=kinds)
    assert sum(-(-count // size) for count in counts) <= count_blocks(rows, size, kinds)


def test_embedding_scan_and_tied_head() -> None:
    """A model with an embedding, a scan over layers and a tied head; rows of tokens."""
    params, tokens = toy_model.params(), jnp.arange(20).reshape(4, 5) % 11
    members = {"a": toy_model.adapter(seed=1), "b": toy_model.adapter(jlora.LoRA(3, alpha=1.0), seed=2)}
    bank, names = jlora.bank.stack(members), ["b", None, "a", "b"]
    out = jax.jit(jlora.bank.apply(toy_model.model))(params, bank, bank.ids(names), tokens)
    np.testing.assert_allclose(out, by_row(toy_model.model, params, bank, names, tokens), rtol=3e-5, atol=3e-5)


def test_axes_of_trees() -> None:
    """Rows along other axes, trees of arguments, shared arguments and keywords."""

    def fun(params: Any, state: Any, x: Any, *, gain: Any) -> Any:
        y = mlp(params, x.T) * gain
        return {"state": state["cache"] + y.sum(-1)[None], "y": y.T, "shared": state["shift"] + y}

    bank, x = bank_of(jlora.LoRA(1)), np.random.default_rng(4).normal(size=(6, 10)).astype(np.float32)
    state = {"cache": np.ones((2, 10), np.float32), "shift": np.float32(2)}
    axes = {"in_axes": ({"cache": 1, "shift": None}, -1), "out_axes": {"state": 1, "y": 1, "shared": 0}}
    for block in (1, 4):
        apply = jax.jit(jlora.bank.apply(fun, **axes, block=block))
        out = apply(PARAMS, bank, bank.ids(NAMES), state, x, gain=np.float32(0.5))
        y = 0.5 * by_row(mlp, PARAMS, bank, NAMES, x.T)
        want = {"state": 1 + jnp.tile(y.sum(-1), (2, 1)), "y": y.T, "shared": y + 2}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), out, want)


def test_gradients() -> None:
    """Each member's gradient is the sum over its rows."""
    bank, x = bank_of(jlora.LoRA(2)), np.random.default_rng(3).normal(size=(10, 6)).astype(np.float32)
    ids = bank.ids(NAMES)

    def loss(bank: Any, block: int) -> Any:
        return (jlora.bank.apply(mlp, block=block)(PARAMS, bank, ids, x) ** 2).sum()

    for block in (1, 3):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(bank, block)
        for k, name in enumerate(bank):
            rows = x[ids == k]
            want = jax.jit(jax.grad(lambda a, rows=rows: (jlora.adapt(mlp)(PARAMS, a, rows) ** 2).sum()))(bank[name])
            for path, update in want.items():
                for factor, value in update.factors.items():
                    got = gradient.adapter[path].factors[factor][k]
                    np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4)


def test_inside_a_scan() -> None:
    """Steps of a decoder with a cache."""

    def step(params: Any, cache: Any, x: Any) -> Any:
        y = mlp(params, x + cache)
        return cache * 0.5 + y, y

    bank, x = bank_of(jlora.LoRA(2)), np.random.default_rng(3).normal(size=(5, 10, 6)).astype(np.float32)
    ids, apply = bank.ids(NAMES), jlora.bank.apply(step)
    _, out = jax.jit(lambda bank: jax.lax.scan(lambda c, x: apply(PARAMS, bank, ids, c, x), jnp.zeros_like(x[0]), x))(
        bank
    )
    for i, name in enumerate(NAMES):
        merged = PARAMS if name is None else jlora.merge(PARAMS, bank[name])
        _, want = jax.lax.scan(lambda c, x, p=merged: step(p, c, x), jnp.zeros((1, 6)), x[:, i : i + 1])
        np.testing.assert_allclose(out[:, i : i + 1], want, rtol=1e-4, atol=1e-4)


def test_ids_that_are_no_member() -> None:
    bank, x = bank_of(jlora.LoRA(2)), np.ones((2, 6), np.float32)
    apply = jlora.bank.apply(mlp)
    with pytest.raises(ValueError, match=re.escape("ids 0 to 2, and -1 for the base, not [-2, 3]")):
        apply(PARAMS, bank, np.array([3, -2]), x)
    under_jit = jax.jit(apply)(PARAMS, bank, jnp.array([3, -1]), x)
    assert np.isnan(under_jit[0]).all()
    assert np.isfinite(under_jit[1]).all()
    assert np.isnan(jax.jit(apply)(PARAMS, bank, jnp.array([-2, 0]), x)[0]).all()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda a, b, x: a(PARAMS, b.adapter, np.zeros(2, int), x), TypeError, "Expected a bank.*dict"),
        (lambda a, b, x: a(PARAMS, b, np.zeros(3, int), x), ValueError, r"ids has shape \(3,\).*expected \(2,\)"),
        (lambda a, b, x: a(PARAMS, b, np.zeros(2), x), ValueError, "dtype float"),
        (lambda a, b, x: jlora.bank.apply(mlp, None)(PARAMS, b, np.zeros(2, int), x), ValueError, "no rows"),
        (lambda a, b, x: jlora.bank.apply(mlp, block=3)(PARAMS, b, np.zeros(2, int), x), ValueError, "1 to 2 rows"),
        (
            lambda a, b, x: jlora.bank.apply(lambda p, x: mlp(p, x).sum(0))(PARAMS, b, np.zeros(2, int), x),
            ValueError,
            "no rows along its axis 0",
        ),
    ],
)
def test_calls_that_do_not_fit(call: Any, error: type[Exception], sentence: str) -> None:
    bank, x = bank_of(jlora.LoRA(2)), np.ones((2, 6), np.float32)
    with pytest.raises(error, match=f"(?s){sentence}"):
        call(jlora.bank.apply(mlp), bank, x)


def test_the_form_is_chosen_by_cost() -> None:
    """Few adapters and many rows share gathered factors; many adapters and few rows are gathered row by row."""
    width = 256
    params = {"up": np.zeros((width, 4 * width), np.float32), "down": np.zeros((4 * width, width), np.float32)}
    sites = jlora.trace(mlp, params, jax.ShapeDtypeStruct((1, width), jnp.float32))
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(8))
    factors = sum(a.nbytes for a in jax.tree.leaves(adapter))

    def temporaries(rows: int, members: int) -> int:
        bank = jlora.bank.stack({str(k): adapter for k in range(members)})
        ids = np.zeros(rows, np.int32)
        x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
        compiled = jax.jit(jlora.bank.apply(mlp)).lower(params, bank, ids, x).compile()
        return memory(compiled).temp_size_in_bytes

    assert temporaries(1024, 2) < 200 * factors  # not 1024
    assert temporaries(8, 32) < 10 * factors


def test_a_cache_is_not_copied() -> None:
    """A step of decoding through a loop over layers, whose cache has its rows along the second axis."""
    layers, rows, positions, width = 3, 4, 64, 32
    params = {"w": jnp.ones((layers, width, width))}

    def step(params: Any, x: Any, cache: Any, position: Any) -> tuple[Any, Any]:
        def layer(x: Any, inputs: Any) -> tuple[Any, Any]:
            w, cache = inputs
            cache = jax.lax.dynamic_update_slice_in_dim(cache, (x @ w)[:, None], position, 1)
            return x + cache.mean(1), cache

        return jax.lax.scan(layer, x, (params["w"], cache))

    x, cache = jnp.ones((rows, width)), jnp.ones((layers, rows, positions, width))
    sites = jlora.trace(step, params, x, cache, 0)
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(1))
    bank = jlora.bank.stack({str(k): adapter for k in range(rows)})
    apply = jlora.bank.apply(step, in_axes=(0, 1, None), out_axes=(0, 1))
    compiled = jax.jit(apply).lower(params, bank, np.arange(rows), x, cache, 0).compile()
    assert memory(compiled).temp_size_in_bytes < cache.nbytes


@pytest.mark.drawn(2)
@pytest.mark.parametrize("name", ["conv_2d", "experts", "scan_stacked", "tied_embedding"])
def test_kinds_of_weights(name: str) -> None:
    """A row is a whole input of the kind."""
    kind = next(kind for kind in KINDS if kind.name == name)
    params, x = jax.tree.map(jnp.asarray, kind.values(np.random.default_rng(7)))
    sites = jlora.trace(kind.use, params, x)
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, dict.fromkeys(kind.weights, jlora.LoRA(1))))
    bank = jlora.bank.stack({str(k): toy_model.nonzero(shapes, k) for k in range(2)})

    def fun(params: Any, x: Any) -> Any:
        return jax.vmap(lambda x: kind.use(params, x))(x)

    batch = jax.tree.map(lambda a: np.stack([a] * 3), x)
    out = jlora.bank.apply(fun)(params, bank, np.array([1, -1, 0]), batch)
    for got, adapter in zip(out, [bank["1"], {}, bank["0"]], strict=True):
        want = kind.use(jlora.merge(params, adapter), x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_biases_under_full() -> None:
    """A bias that no product uses, and a stack of them that a scan runs through, have rows too."""
    params, tokens = toy_model.params(), jnp.arange(20).reshape(4, 5) % 11
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), toy_model.sites(), {".*bias": jlora.Full()}))
    members = {name: toy_model.nonzero(shapes, seed) for name, seed in {"a": 1, "b": 2}.items()}
    bank, names = jlora.bank.stack(members), ["b", None, "a", "b"]
    out = jax.jit(jlora.bank.apply(toy_model.model))(params, bank, bank.ids(names), tokens)
    np.testing.assert_allclose(out, by_row(toy_model.model, params, bank, names, tokens), rtol=1e-4, atol=1e-4)


def test_rows_that_the_program_maps_itself() -> None:
    """`select` with `jax.vmap` is `apply`; factors of stacked layers have their rows on the second axis."""
    params, tokens = toy_model.params(), jnp.arange(20).reshape(4, 5) % 11
    bank = jlora.bank.stack({"a": toy_model.adapter(seed=1), "b": toy_model.adapter(jlora.LoRA(3), seed=2)})
    ids = bank.ids(["b", None, "a", "b"])
    members, axes = jlora.bank.select(bank, ids)
    assert members["layers/up"].factors["a"].shape[:2] == (toy_model.LAYERS, 4)
    assert members["mix/kernel"].factors["a"].shape[0] == 4
    out = jax.vmap(jlora.adapt(toy_model.model), (None, axes, 0))(params, members, tokens[:, None])
    want = jlora.bank.apply(toy_model.model)(params, bank, ids, tokens)
    np.testing.assert_allclose(out[:, 0], want, rtol=3e-5, atol=3e-5)
    with pytest.raises(ValueError, match="ids 0 to 1"):
        jlora.bank.select(bank, np.array([2]))


def test_an_unknown_id_harms_no_other_row() -> None:
    """Under `jit` rows of an unknown id need a block of their own beside those of all members and of the base."""
    bank, x = bank_of(jlora.LoRA(2)), np.random.default_rng(3).normal(size=(5, 6)).astype(np.float32)
    ids = np.array([2, 7, 0, -1, 1])
    out = jax.jit(jlora.bank.apply(mlp, block=4))(PARAMS, bank, ids, x)
    rows = [0, 2, 3, 4]
    want = by_row(mlp, PARAMS, bank, ["member 2", "member 0", None, "member 1"], x[np.array(rows)])
    np.testing.assert_allclose(out[np.array(rows)], want, rtol=1e-4, atol=1e-4)
    assert np.isnan(out[1]).all()


def test_known_ids_hold_no_nan_on_the_way() -> None:
    with jax.debug_nans(True):
        members, _ = jlora.bank.select(bank_of(jlora.LoRA(2)), np.array([2, -1]))
    assert members["up"].traced_scale.tolist() == [1, 0]


@pytest.mark.parametrize("block", [None, 4])
def test_a_batch_without_rows(block: int | None) -> None:
    bank, x = bank_of(jlora.LoRA(2)), jnp.zeros((0, 6))
    out = jax.jit(jlora.bank.apply(mlp, block=block))(PARAMS, bank, bank.ids([]), x)
    assert out.shape == mlp(PARAMS, x).shape
