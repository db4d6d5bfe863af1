"""Faults that public reports and trials found at the edges of the library, each with the correct value."""

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.agreement import check_law, close
from tests.support.methods import METHODS, fitting

PARAMS = {"w": jax.random.normal(jax.random.key(0), (16, 12)), "v": jax.random.normal(jax.random.key(1), (12, 12))}
X = jax.random.normal(jax.random.key(2), (4, 16))


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def adapter_of(fun=model, params=PARAMS, method=None):
    sites = jlora.trace(fun, params, X)
    adapter = jlora.init(jax.random.key(3), sites, method or jlora.LoRA(rank=2))
    return jax.tree.map(lambda a: a + 0.1, adapter)


@pytest.mark.parametrize(
    ("cast", "is_dense"),
    [
        (lambda w: w.astype(jnp.float8_e4m3fn).astype(w.dtype), True),
        (lambda w: w.astype(jnp.float8_e5m2).astype(w.dtype), True),
        (lambda w: jax.lax.reduce_precision(w, 4, 3), True),
        (lambda w: jax.lax.reduce_precision(w, 8, 23), False),
    ],
    ids=["e4m3", "e5m2", "reduce_precision", "no_reduction"],
)
def test_base_and_update_are_rounded_together_to_few_bits(cast, is_dense):
    def fun(params, x):
        return x @ cast(params["w"])

    adapter = adapter_of(lambda params, x: x @ params["w"])
    adapter = {"w": adapter["w"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = jlora.adapt(fun)(PARAMS, adapter, X)
    merged, base = fun(jlora.merge(PARAMS, adapter), X), fun(PARAMS, X)
    error = float(jnp.abs(adapted - merged).max() / jnp.abs(merged - base).max())
    assert error < 1e-5
    assert any(issubclass(w.category, jlora.DenseWarning) for w in caught) == is_dense


def test_a_function_that_was_adapted_twice_raises():
    with pytest.raises(TypeError, match=r"adapted twice.*pass a list of adapters"):
        jlora.adapt(jlora.adapt(model))(PARAMS, adapter_of(), adapter_of(), X)


@pytest.mark.parametrize("name", ["params", "adapter", "fun"])
def test_a_keyword_of_the_program_may_have_any_name(name):
    def fun(weights, x, **options):
        return (x @ weights["w"]) * options[name]

    adapter = {"w": adapter_of()["w"]}
    assert "w" in jlora.trace(fun, PARAMS, X, **{name: 2.0})
    adapted = jlora.adapt(fun)(PARAMS, adapter, X, **{name: 2.0})
    close(adapted, fun(jlora.merge(PARAMS, adapter), X, **{name: 2.0}), 1e-5)
    assert len(jlora.explain(fun, PARAMS, adapter, X, **{name: 2.0}).uses) == 1


def test_params_and_adapter_may_be_named():
    adapter = adapter_of()
    close(jlora.adapt(model)(params=PARAMS, adapter=adapter, x=X), jlora.adapt(model)(PARAMS, adapter, X), 1e-6)
    with pytest.raises(TypeError, match=r"called as g\(params, adapter, \*args\), and got 1 of these 2"):
        jlora.adapt(model)(PARAMS)


def test_a_misfit_is_told_before_the_program_runs():
    def fun(params, x):
        return x @ params["nested"]["w"]

    adapter = adapter_of(fun, {"nested": {"w": PARAMS["w"]}})
    with pytest.raises(ValueError, match="nested/w: no such parameter"):
        jlora.adapt(fun)(PARAMS, adapter, X)


@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2), jlora.IA3(), jlora.OFT(4)], ids=repr)
def test_an_adapter_scaled_to_zero_costs_nothing_and_is_the_base(method):
    off = jlora.scale(adapter_of(method=method), 0)

    def compiled(adapter):
        return jax.jit(lambda p, x: jlora.adapt(model)(p, adapter, x)).lower(PARAMS, X).compile()

    def flops(adapter):
        return (compiled(adapter).cost_analysis() or {})["flops"]

    assert flops(off) == flops({})
    np.testing.assert_array_equal(compiled(off)(PARAMS, X), compiled({})(PARAMS, X))
    close(jlora.merge(PARAMS, off), PARAMS, 1e-7)


def test_sites_are_pickled_and_copied():
    sites = jlora.trace(model, PARAMS, X)
    for again in (pickle.loads(pickle.dumps(sites)), copy.deepcopy(sites)):
        assert str(again) == str(sites)
        same = jlora.init(jax.random.key(0), again, jlora.LoRA(2)), jlora.init(jax.random.key(0), sites, jlora.LoRA(2))
        close(*same, 0)


def test_restart_takes_a_rank_above_the_sides_of_a_weight():
    def fun(params, x):
        return x @ params["head"]

    params = {"head": jax.random.normal(jax.random.key(0), (16, 1))}
    a, b = jnp.ones((16, 4)), jnp.ones((4, 1))
    adapter = {"head": jlora.Update({"a": a, "b": b}, jlora.LoRA(4, 4.0), ("in", "out"), (16, 1))}
    merged, new = jlora.restart(jax.random.key(1), jlora.trace(fun, params, X), params, adapter)
    close(merged["head"], params["head"] + a @ b, 1e-5)
    assert new["head"].factors["a"].shape == (16, 4)
    assert not new["head"].factors["b"].any()


def test_dequantize_takes_trees_and_leaves_plain_arrays_alone():
    sites = jlora.trace(model, PARAMS, X)
    quantized = jlora.quantize(PARAMS, sites, {"w": "nf4"})
    plain = jlora.dequantize(quantized)
    close(plain["w"], quantized["w"].dequantize(), 0)
    assert plain["v"] is PARAMS["v"]
    assert jlora.dequantize(PARAMS["w"]) is PARAMS["w"]
    assert jlora.dequantize(None) is None


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "name",
    ["lora", "dora", "ia3", *(pytest.param(name, marks=pytest.mark.nightly) for name in METHODS)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_traced_scale_is_the_number(name, dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X))
    sites = jlora.trace(model, params, x)
    adapter = jlora.init(jax.random.key(3), sites, {"w": fitting(name, sites["w"])}, params=params, dtype=dtype)
    adapter = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), adapter)
    adapted = jlora.adapt(model, on_dense="allow")

    def output(scale, adapter):
        return adapted(params, jlora.scale(jlora.scale(adapter, scale), 2), x)

    bound = 1e-5 if dtype == jnp.float32 else 0.04
    got, gradient = jax.jit(jax.value_and_grad(lambda s: output(s, adapter).astype(jnp.float32).sum()))(0.25)
    close(got, output(0.25, adapter).astype(jnp.float32).sum(), bound)
    step = 1 / 64
    slope = (output(0.25 + step, adapter) - output(0.25 - step, adapter)).astype(jnp.float32).sum() / (2 * step)
    if dtype == jnp.float32:
        close(gradient, slope, 0.1)
    merged = jax.jit(lambda s: jlora.merge(params, jlora.scale(adapter, s)))(0.5)
    close(merged, jlora.merge(params, jlora.scale(adapter, 0.5)), bound)


def test_one_program_for_many_scales(tmp_path):
    adapter = adapter_of()
    scales = jnp.array([0.0, 0.5, 1.0])
    many = jax.vmap(lambda s: jlora.adapt(model)(PARAMS, jlora.scale(adapter, s), X))(scales)
    close(many, jnp.stack([jlora.adapt(model)(PARAMS, jlora.scale(adapter, float(s)), X) for s in scales]), 1e-5)
    scaled = jax.jit(jlora.scale)(adapter, 0.5)
    jlora.save(tmp_path / "a", scaled)
    loaded = jlora.load(tmp_path / "a")
    assert [update.scale for update in loaded.values()] == [0.5, 0.5]
    close(jlora.adapt(model)(PARAMS, loaded, X), jlora.adapt(model)(PARAMS, jlora.scale(adapter, 0.5), X), 1e-6)
    with pytest.raises(TypeError, match="expects a scalar, not an array of shape"):
        jax.jit(jlora.scale)(adapter, scales)


def chain_of_three(params, x):
    return x @ (params["w"] @ params["v"] @ params["v"].T)


def scanned_product(params, x):
    product = jax.jit(jnp.matmul)(params["w"], params["v"])
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ product @ product.T), None), x, None, length=3)[0]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("targets", ["w|v", "w", "v"])
@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2)], ids=repr)
@pytest.mark.parametrize("fun", [chain_of_three, scanned_product], ids=lambda fun: fun.__name__)
def test_a_product_of_weights_stays_factored(fun, method, targets):
    params = jax.tree.map(lambda a: a / 4, PARAMS)
    sites = jlora.trace(fun, params, X)
    adapter = jlora.init(jax.random.key(3), sites, {targets: method})
    adapter = jax.tree.map(lambda a: a + 0.01, adapter)
    check_law(fun, params, adapter, X, bound=5e-5, on_dense="error")
    assert jlora.explain(fun, params, adapter, X).dense == ()


def test_roles_of_weights_that_are_multiplied():
    sites = jlora.trace(chain_of_three, PARAMS, X)
    assert sites["w"].roles == sites["v"].roles == ("in", "out")
    assert "yes" in str(sites)


def test_a_weight_in_the_place_of_an_activation_is_reported():
    def fun(params, x):
        rows = jax.lax.ragged_dot(params["w"], params["v"][None], jnp.array([16]))
        return x @ rows + jax.lax.conv(params["w"][None].mT, params["v"][:, :, None], (1,), "SAME")[0, :, :4].T

    sites = jlora.trace(fun, PARAMS, X)
    assert sites["v"].unsupported_reason == ""
    assert sites["w"].unsupported_reason == (
        "it takes the place of the activation wherever it is multiplied (conv_general_dilated, ragged_dot_general)"
    )
    both = jlora.trace(chain_of_three, PARAMS, X)
    adapter = jax.tree.map(lambda a: a + 0.1, jlora.init(jax.random.key(3), both, jlora.LoRA(2)))
    dense = [(use.path, use.primitive) for use in jlora.explain(fun, PARAMS, adapter, X).dense]
    assert dense == [("w", "ragged_dot_general"), ("v", "ragged_dot_general"), ("w", "conv_general_dilated")]
    check_law(fun, PARAMS, adapter, X, bound=5e-5, on_dense="allow")
