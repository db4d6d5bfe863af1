"""Adapters of quantised bases: the law, initialisers, merge, checkpoints and meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quantized import nf4
from tests.support import toy_model
from tests.support.quantized import FORMS, quantized, weight


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("form", "method"),
    [(form, jlora.LoRA(2)) for form in FORMS]
    + [("nf4", method) for method in (jlora.DoRA(2), jlora.LoHa(1), jlora.HiRA(2), jlora.IA3(), jlora.HRA(2))],
)
def test_law(form: str, method: jlora.Method) -> None:
    """Stacked, tied and plain weights in each format, under methods that depend on the base and methods that do not."""
    params = quantized(form)
    adapter = toy_model.random_adapter(toy_model.sites(), method, params=params)
    adapted = jlora.adapt(toy_model.model, on_dense="allow")

    @jax.jit
    def sides(adapter: dict, params: dict) -> list:
        def left(adapter: dict) -> jax.Array:
            return adapted(params, adapter, toy_model.tokens())

        def right(adapter: dict) -> jax.Array:
            return toy_model.model(jlora.merge(params, adapter), toy_model.tokens())

        return [(f(adapter), jax.grad(lambda adapter, f=f: toy_model.loss(f(adapter)))(adapter)) for f in (left, right)]

    left, right = sides(adapter, params)
    top = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(right))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * top)


@pytest.mark.parametrize("start", ["pissa", "olora", "milora"])
def test_initialisers_read_the_dequantised_weight(start: str) -> None:
    params = quantized("nf4")
    method = jlora.LoRA(2, start=start, offset=True)
    actual, expected = (
        jlora.init(jax.random.key(0), toy_model.sites(), method, params=p) for p in (params, jlora.merge(params, {}))
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("form", FORMS)
def test_merge_gives_arrays_or_the_same_form(form: str) -> None:
    params = quantized(form)
    adapter = {path: update for path, update in toy_model.adapter().items() if path == "layers/up"}
    merged = jlora.merge(params, adapter)
    assert jax.tree.structure(merged) == jax.tree.structure(toy_model.params())
    np.testing.assert_array_equal(merged["embed"], jlora.dequantize(params["embed"]))
    again = jlora.merge(params, adapter, requantize=True)
    assert again["embed"] is params["embed"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), again) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    whole = merged["layers"]["up"]
    rounding = float(jnp.linalg.norm(jlora.dequantize(again["layers"]["up"]) - whole) / jnp.linalg.norm(whole))
    assert 0 < rounding < 0.15
    with pytest.raises(ValueError, match="rounding cannot be undone"):
        jlora.unmerge(params, adapter)


def test_sites_and_checkpoints_of_a_quantised_base(tmp_path) -> None:
    params = quantized("nf4")
    assert str(jlora.trace(toy_model.model, params, toy_model.tokens())) == str(toy_model.sites())
    jlora.save(tmp_path / "adapter", toy_model.adapter(), params=params, hashes=True)
    loaded = jlora.load(tmp_path / "adapter", params=params)
    jax.tree.map(np.testing.assert_array_equal, loaded, toy_model.adapter())
    with pytest.raises(jlora.CheckpointError, match="base values differ"):
        jlora.load(tmp_path / "adapter", params=toy_model.params())


def test_restart_and_exchange_of_a_quantised_base(tmp_path) -> None:
    params = quantized("int8")
    adapter = jlora.init(jax.random.key(0), toy_model.sites(), {"mix/kernel": jlora.DoRA(2)}, params=params)
    names = {"mix/kernel": "mix"}
    jlora.peft.save(tmp_path / "peft", adapter, names, params=params)
    again = jlora.peft.load(tmp_path / "peft", toy_model.sites(), names, params=params)
    np.testing.assert_allclose(again["mix/kernel"]["m"], adapter["mix/kernel"]["m"], atol=1e-6)
    base, started = jlora.restart(jax.random.key(1), toy_model.sites(), params, toy_model.adapter())
    assert jax.tree.structure(base) == jax.tree.structure(params)
    assert set(started) == set(toy_model.adapter())
    donated = jlora.merge(params, toy_model.adapter(), donate=True)
    np.testing.assert_array_equal(donated["embed"], jlora.merge(params, toy_model.adapter())["embed"])


def test_eight_devices_hold_parts_of_a_quantized_weight() -> None:
    """The factors are placed along the codes, and the result is that of one device."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    one = {"w": nf4.quantize(jnp.asarray(weight(128, 8)), 0, 64, None)}
    eight = {"w": jax.device_put(one["w"], sharding)}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"])

    x = jnp.asarray(weight(4, 128))
    adapter = toy_model.random_adapter(jlora.trace(model, one, x), jlora.DoRA(2))
    sharded = jax.device_put(adapter, jlora.shardings(adapter, eight))
    assert sharded["w"].factors["a"].sharding.spec == jax.sharding.PartitionSpec("x", None)
    assert sharded["w"].factors["b"].sharding.spec == jax.sharding.PartitionSpec(None, "y")
    adapted = jax.jit(jlora.adapt(model, on_dense="error"))
    np.testing.assert_allclose(adapted(eight, sharded, x), adapted(one, adapter, x), atol=1e-5)
