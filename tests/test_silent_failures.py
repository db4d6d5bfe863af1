"""Failures that raise no error in other libraries, one test each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.agreement import close

pytestmark = pytest.mark.check_leaks
METHODS = [jlora.LoRA(rank=2), jlora.LoRA(rank=2, alpha=5.0, rank_stabilized=True, dropout=0.5), jlora.Full()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_at_the_start_the_program_is_the_base(method):
    params, adapter = toy_model.params(), jlora.init(jax.random.key(0), toy_model.sites(), method)
    ours = jax.jit(jlora.adapt(toy_model.model))(params, adapter, toy_model.tokens())
    assert np.array_equal(ours, jax.jit(toy_model.model)(params, toy_model.tokens()))
    moved = jax.jit(jlora.adapt(toy_model.model))(params, toy_model.nonzero(adapter), toy_model.tokens())
    assert np.abs(np.asarray(moved - ours)).max() > 1e-3


def test_the_base_gets_no_gradient():
    params, adapter = toy_model.params(), toy_model.adapter()

    def loss(params, adapter, ids):
        return toy_model.loss(jlora.adapt(toy_model.model)(params, adapter, ids))

    gradients, ours = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, adapter, toy_model.tokens())
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradients))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(ours))


def test_a_weight_used_twice_is_adapted_in_both_uses():
    params = toy_model.params()
    adapter = {path: update for path, update in toy_model.adapter().items() if path == "embed"}
    uses = jlora.explain(toy_model.model, params, adapter, toy_model.tokens()).uses
    assert {use.primitive for use in uses} == {"gather", "dot_general"}
    assert all(use.factored for use in uses)
    merged = jlora.merge(params, adapter)
    lookup = {**params, "embed": merged["embed"]}
    both = jlora.adapt(toy_model.model)(params, adapter, toy_model.tokens())
    close(both, toy_model.model(lookup, toy_model.tokens()))

    def untied(p, head, ids):
        return toy_model.model({**p, "embed": head}, ids)

    # One use alone would give something else.
    hidden = functools.partial(toy_model.model, lookup)
    one = jax.jit(lambda ids: hidden(ids) @ jnp.linalg.pinv(merged["embed"].T) @ params["embed"].T)(toy_model.tokens())
    assert np.abs(np.asarray(one - both)).max() > 1e-3


@pytest.mark.parametrize("wrap", ["jit", "scan", "checkpoint", "custom_vjp", "vmap", "shard_map"])
def test_a_weight_under_a_transformation_is_adapted_the_same(wrap):
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}
    x = jax.random.normal(jax.random.key(1), (8, 6))

    def product(w, x):
        return jnp.tanh(x @ w)

    @jax.custom_vjp
    def ruled(w, x):
        return product(w, x)

    ruled.defvjp(lambda w, x: jax.vjp(product, w, x), lambda vjp, g: vjp(g))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    wrapped = {
        "jit": jax.jit(product),
        "scan": lambda w, x: jax.lax.scan(lambda c, _: (product(w, c), None), x, length=2)[0],
        "checkpoint": jax.checkpoint(product),
        "custom_vjp": ruled,
        "vmap": lambda w, x: jax.vmap(product, (None, 0))(w, x),
        "shard_map": jax.shard_map(product, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d")),
    }[wrap]

    def f(p, x):
        return wrapped(p["w"], x)

    sites = (
        jlora.trace(f, params, x) if wrap != "custom_vjp" else jlora.trace(lambda p, x: product(p["w"], x), params, x)
    )
    adapter = toy_model.random_adapter(sites, {"w": jlora.LoRA(rank=2)})
    apply = jlora.adapt(f, on_dense="allow" if wrap == "custom_vjp" else "error")
    value, grads = jax.jit(jax.value_and_grad(lambda a: toy_model.loss(apply(params, a, x))))(adapter)
    want, want_grads = jax.jit(jax.value_and_grad(lambda a: toy_model.loss(f(jlora.merge(params, a), x))))(adapter)
    close((value, grads), (want, want_grads))
    assert abs(float(want - toy_model.loss(f(params, x)))) > 1e-3


def test_keys_are_folded_from_paths():
    sites, key = toy_model.sites(), jax.random.key(5)
    one = jlora.init(key, sites, {"layers/up": jlora.LoRA(rank=2)})
    two = jlora.init(key, sites, {"mix/kernel": jlora.LoRA(rank=2), "layers/(up|down)": jlora.LoRA(rank=2)})
    assert np.array_equal(one["layers/up"].factors["a"], two["layers/up"].factors["a"])
    a, b = two["layers/up"].factors["a"], two["mix/kernel"].factors["a"]
    assert not np.isin(np.asarray(a).ravel(), np.asarray(b).ravel()).any()
    assert len(np.unique(np.asarray(a))) == a.size  # layers of a stack share nothing either


def test_the_base_is_never_changed():
    params = toy_model.params()
    before = jax.tree.map(np.array, params)
    adapter = toy_model.adapter()
    merged = jlora.merge(params, adapter)
    jlora.unmerge(merged, adapter)
    jlora.adapt(toy_model.model)(params, adapter, toy_model.tokens())
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        assert np.array_equal(a, b)


def test_a_dense_fallback_is_reported_and_right():
    params, x = {"w": jax.random.normal(jax.random.key(0), (5, 4))}, jnp.ones((3, 5))

    def f(p, x):
        return x @ p["w"] + jnp.linalg.norm(p["w"])

    adapter = toy_model.random_adapter(jlora.trace(f, params, x), jlora.LoRA(rank=2))
    with pytest.warns(jlora.DenseWarning, match="w: "):
        ours = jlora.adapt(f)(params, adapter, x)
    close(ours, f(jlora.merge(params, adapter), x))
    with pytest.raises(jlora.DenseError, match="w: "):
        jlora.adapt(f, on_dense="error")(params, adapter, x)
    explained = jlora.explain(f, params, adapter, x)
    assert [use.bytes for use in explained.dense] == [5 * 4 * 4] * len(explained.dense)
    assert explained.dense
    assert "dense" in str(explained)


def test_scaling_travels_with_the_adapter(tmp_path):
    params = toy_model.params()
    adapter = jlora.scale(toy_model.adapter(jlora.LoRA(rank=2, alpha=7.0, rank_stabilized=True)), 0.5)
    jlora.save(tmp_path / "adapter", adapter)
    loaded = jlora.load(tmp_path / "adapter")
    assert jax.tree.structure(adapter) == jax.tree.structure(loaded)
    close(jlora.merge(params, loaded), jlora.merge(params, adapter), 0)
    u = adapter["mix/kernel"].factors
    expected = params["mix"]["kernel"] + 0.5 * 7.0 / np.sqrt(2) * u["a"] @ u["b"]
    close(jlora.merge(params, loaded)["mix"]["kernel"], expected)
