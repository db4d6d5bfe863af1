"""Quantised bases: formats by their definitions; how weights are rounded, merged, refused and held in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn

import jlora
from jlora.quantized import GGUF, NF4, nf4
from tests.support import compiled as report
from tests.support import toy_model
from tests.support.int8_rows import rounded

FORMS = ["nf4", "int8", "int4", "fp8"]


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def in_blocks(table: np.ndarray, transposed: bool = False) -> GGUF:
    empty = GGUF(jnp.zeros((0, 18), jnp.uint8), "Q4_0", transposed)
    return empty.requantize(jnp.asarray(table))


def quantized(form: str) -> dict:
    return jlora.quantize(toy_model.params(), toy_model.sites(), {"embed|mix/kernel|layers/(up|down)": form})


@pytest.mark.parametrize(
    ("form", "method"),
    [(form, jlora.LoRA(2)) for form in FORMS]
    + [("nf4", method) for method in (jlora.DoRA(2), jlora.LoHa(1), jlora.HiRA(2), jlora.IA3(), jlora.HRA(2))],
)
def test_law(form: str, method: jlora.Method) -> None:
    """Stacked, tied and plain weights in each format, under methods that depend on the base and methods that do not."""
    params = quantized(form)
    adapter = toy_model.nonzero(jlora.init(jax.random.key(0), toy_model.sites(), method, params=params))
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
def test_starts_look_at_what_the_base_stands_for(start: str) -> None:
    params = quantized("nf4")
    method = jlora.LoRA(2, start=start, offset=True)
    found, expected = (
        jlora.init(jax.random.key(0), toy_model.sites(), method, params=p) for p in (params, jlora.merge(params, {}))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nf4_is_its_definition() -> None:
    values = weight(128, 6)
    array = nf4.quantize(jnp.asarray(values), axis=0, block=64, group=None)
    blocks = values.reshape(2, 64, 6)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - np.array(nf4.VALUES)).argmin(axis=-1)
    expected = (np.array(nf4.VALUES, np.float32)[nearest] * scale).reshape(128, 6)
    np.testing.assert_allclose(array.dequantize(), expected, rtol=0, atol=1e-6)
    same = qwix.quantize(jnp.asarray(values), "nf4", channelwise_axes=[1], tiled_axes={0: 64})
    np.testing.assert_allclose(array.dequantize(), qwix.dequantize(same), rtol=0, atol=1e-6)


def test_scales_in_eight_bits_cost_little() -> None:
    values = jnp.asarray(weight(256, 512))
    once, twice = (nf4.quantize(values, axis=0, group=group) for group in (None, 256))
    bits = [8 * sum(part.nbytes for part in jax.tree.leaves(array)) / values.size for array in (once, twice)]
    assert bits == [4.5, pytest.approx(4 + 8 / 64 + 2 * 32 / (64 * 256))]
    errors = [float(jnp.linalg.norm(array.dequantize() - values)) for array in (once, twice)]
    assert errors[1] < 1.005 * errors[0]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_nf4_along_any_axis(axis: int) -> None:
    values = jnp.asarray(weight(4, 8, 16))
    array = nf4.quantize(values, axis=axis, block=4)
    assert array.shape == values.shape
    turned = nf4.quantize(jnp.moveaxis(values, axis, 0), axis=0, block=4, group=None).dequantize()
    plain = nf4.quantize(values, axis=axis, block=4, group=None).dequantize()
    np.testing.assert_array_equal(jnp.moveaxis(plain, axis, 0), turned)
    errors = [float(jnp.linalg.norm(found - values)) for found in (array.dequantize(), plain)]
    assert errors[0] < 1.05 * errors[1]


def test_nf4_of_zeros_is_zero() -> None:
    assert not nf4.quantize(jnp.zeros((4, 8)), axis=0).dequantize().any()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_read_as_gguf_reads_them(kind: str) -> None:
    values = weight(3, 5, 64)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    array = GGUF(jnp.asarray(data), kind)
    assert array.shape == (3, 5, 64)
    np.testing.assert_allclose(array.dequantize(), expected, rtol=1e-6, atol=1e-7)
    turned = GGUF(jnp.asarray(data), kind, transposed=True)
    np.testing.assert_array_equal(turned.dequantize(), array.dequantize().mT)
    again = array.requantize(jnp.asarray(values)).dequantize()
    theirs = np.linalg.norm(expected - values)
    assert np.linalg.norm(again - values) <= 1.02 * theirs
    kept = array.requantize(array.dequantize()).dequantize()
    np.testing.assert_allclose(kept, array.dequantize(), atol=2e-3)


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
    with pytest.raises(ValueError, match="what was rounded cannot be taken out"):
        jlora.unmerge(params, adapter)


@pytest.mark.filterwarnings("ignore:'VariableState':DeprecationWarning")
def test_models_that_qwix_has_quantized() -> None:
    """Parameters as `qwix.quantize_params` leaves them, and the plain model: what qwix's own model computes."""
    model, x = nn.Dense(6), jnp.asarray(weight(5, 8))
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)]
    theirs = qwix.quantize_model(model, qwix.PtqProvider(rules))
    plain = model.init(jax.random.key(0), x)
    abstract = jax.eval_shape(theirs.init, jax.random.key(0), x)
    variables = {"params": qwix.quantize_params(plain["params"], abstract["params"])}
    assert variables["params"]["kernel"].array.qvalue.dtype == jnp.int8
    sites = jlora.trace(model.apply, variables, x)
    adapted = jlora.adapt(model.apply)
    adapter = jlora.init(jax.random.key(1), sites, {"params/kernel": jlora.LoRA(2)})
    np.testing.assert_allclose(adapted(variables, adapter, x), cast(jax.Array, theirs.apply(variables, x)), atol=1e-5)
    adapter = toy_model.nonzero(adapter)
    expected = cast(jax.Array, model.apply(jlora.merge(variables, adapter), x))
    np.testing.assert_allclose(adapted(variables, adapter, x), expected, atol=1e-5)


def test_sites_and_checkpoints_see_the_weight(tmp_path) -> None:
    params = quantized("nf4")
    assert str(jlora.trace(toy_model.model, params, toy_model.tokens())) == str(toy_model.sites())
    jlora.save(tmp_path / "adapter", toy_model.adapter(), params=params, hashes=True)
    loaded = jlora.load(tmp_path / "adapter", params=params)
    jax.tree.map(np.testing.assert_array_equal, loaded, toy_model.adapter())
    with pytest.raises(jlora.CheckpointError, match="base values differ"):
        jlora.load(tmp_path / "adapter", params=toy_model.params())


def test_a_step_holds_one_layer_at_a_time() -> None:
    """No more temporary bytes than on a float base, whose own layers are sliced out of the stack as well."""
    layers, width = 12, 256
    weights = {"w": jnp.asarray(weight(layers, width, width) / 16)}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    x = jnp.ones((16, width))
    sites = jlora.trace(model, weights, x)
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(4))
    adapted = jlora.adapt(model, on_dense="error")

    def memory(params: dict) -> tuple[int, int]:
        step = jax.jit(jax.grad(lambda adapter, params, x: jnp.square(adapted(params, adapter, x)).mean()))
        stats = report.memory(step.lower(adapter, params, x).compile())
        return stats.argument_size_in_bytes, stats.temp_size_in_bytes

    arguments, temporary = memory(weights)
    for form, share in (("int8", 0.3), ("nf4", 0.2)):
        rounded_arguments, rounded_temporary = memory(jlora.quantize(weights, sites, {"w": form}))
        assert rounded_arguments < share * arguments
        assert rounded_temporary <= temporary + 1.1 * width * width * 4


BEFORE_THE_LOOP: dict[str, Callable] = {
    "scaled": lambda w: 0.5 * w,
    "transposed": lambda w: w.swapaxes(0, 1),
    "of a group": lambda w: w.reshape(3, 2, 8, 8)[:, 1],
}


@pytest.mark.parametrize("before", BEFORE_THE_LOOP.values(), ids=BEFORE_THE_LOOP)
def test_a_stack_that_a_loop_cannot_cut(before: Callable) -> None:
    """It is dequantised before the loop, and its update stays factored."""

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, before(p["w"]))[0]

    first = (8, 6, 8) if before is BEFORE_THE_LOOP["transposed"] else (6, 8, 8)
    params, x = {"w": rounded(weight(*first))}, jnp.ones((4, 8))
    adapter = toy_model.nonzero(jlora.init(jax.random.key(0), jlora.trace(model, params, x), {"w": jlora.LoRA(2)}))
    actual = jlora.adapt(model, on_dense="error")(params, adapter, x)
    np.testing.assert_allclose(actual, model(jlora.merge(params, adapter), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("make", [rounded, in_blocks], ids=["rounded", "gguf"])
def test_a_lookup_makes_its_rows_alone(make: Callable, mode: str) -> None:
    """The table is never dequantised as a whole: not for one token, nor for many, in bounds or out of bounds."""
    table = weight(4096, 64)
    weights = {"w": make(table)}
    ids = jnp.array([[3, 4095, 0], [7, 7, 1]] if mode == "promise_in_bounds" else [[3, 5000, -1], [-5000, 7, 1]])

    def look(params: dict, ids: jax.Array) -> jax.Array:
        return params["w"].at[ids].get(mode=mode)

    for some in (ids, ids[:1, :1], jnp.array([[3, 100]], jnp.uint8)):
        sites = jlora.trace(look, weights, some)
        adapter = jlora.init(jax.random.key(1), sites, {"w": jlora.LoRA(4)})
        expected = look(jlora.merge(weights, adapter), some)
        run = jax.jit(jlora.adapt(look))
        assert np.allclose(run(weights, adapter, some), expected, atol=1e-6, equal_nan=True)
        assert report.memory(run.lower(weights, adapter, some).compile()).temp_size_in_bytes < table.nbytes / 16


def test_a_lookup_in_a_transposed_table() -> None:
    """As many rows as columns, so that shapes do not tell them apart."""
    weights = {"w": in_blocks(weight(64, 64), transposed=True)}
    ids = jnp.array([3, 0, 63])
    sites = jlora.trace(lambda params, ids: params["w"][ids], weights, ids)
    adapter = toy_model.nonzero(jlora.init(jax.random.key(1), sites, {"w": jlora.LoRA(4)}))
    adapted = jlora.adapt(lambda params, ids: params["w"][ids])(weights, adapter, ids)
    assert np.allclose(adapted, jlora.merge(weights, adapter)["w"][ids], atol=1e-6)


def test_no_float_copy_in_the_program() -> None:
    """The gradient keeps codes for its backward pass: no float weight among what the forward pass hands on."""
    params = {"w": rounded(weight(8, 6))}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"].astype(jnp.bfloat16).T)

    x = jnp.ones((3, 6), jnp.bfloat16)
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, x), jlora.LoRA(2))
    adapted = jlora.adapt(model)
    _, pull = jax.vjp(functools.partial(lambda adapter, x: adapted(params, adapter, x)), adapter, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) in ((8, 6), (6, 8))]
    assert {leaf.dtype for leaf in kept} <= {jnp.dtype(jnp.int8)}


def test_what_cannot_be_quantized_is_refused() -> None:
    params, sites = toy_model.params(), toy_model.sites()
    with pytest.raises(ValueError, match=r"mix/bias \(8,\) cannot be quantised"):
        jlora.quantize(params, sites, {"mix/.*": "nf4"})
    with pytest.raises(ValueError, match="'nf3' is not a format for mix/kernel: use nf4, int8"):
        jlora.quantize(params, sites, {"mix/kernel": "nf3"})
    with pytest.raises(ValueError, match="already quantised"):
        jlora.quantize(quantized("int8"), sites, {"mix/kernel": "nf4"})
    with pytest.raises(ValueError, match="matches no parameter"):
        jlora.quantize(params, sites, {"mix/kernels": "nf4"})
    with pytest.raises(ValueError, match="no blocks of even size"):
        nf4.quantize(jnp.ones((5, 4)), axis=0)
    with pytest.raises(ValueError, match="GGUF reads Q4_0, Q4_1, Q8_0; the tensor is Q5_0"):
        GGUF(jnp.zeros((2, 18), jnp.uint8), "Q5_0")
    with pytest.raises(ValueError, match="multiple of 20 bytes"):
        GGUF(jnp.zeros((2, 18), jnp.uint8), "Q4_1")


def test_loftq_starts_near_the_weight() -> None:
    params, low = toy_model.params(), quantized("nf4")
    adapter = jlora.init(jax.random.key(0), toy_model.sites(), {"layers/up|mix/kernel": jlora.LoRA(2, alpha=5.0)})
    kernel = params["mix"]["kernel"]

    def gaps(steps: int) -> float:
        base, started = jlora.loftq(adapter, params, low, steps=steps)
        assert base["embed"] is low["embed"]
        assert jax.tree.structure(started) == jax.tree.structure(adapter)
        merged = jlora.merge(base, started)
        stacked = jnp.linalg.norm(merged["layers"]["up"] - params["layers"]["up"], axis=(1, 2))
        rounding = jnp.linalg.norm(jlora.dequantize(low["layers"]["up"]) - params["layers"]["up"], axis=(1, 2))
        assert (stacked < rounding).all()
        return float(jnp.linalg.norm(merged["mix"]["kernel"] - kernel))

    tail = np.linalg.svd(np.asarray(kernel - jlora.dequantize(low["mix"]["kernel"])), compute_uv=False)[2:]
    assert gaps(1) == pytest.approx(np.linalg.norm(tail), rel=1e-4)


def test_loftq_comes_nearer_with_every_turn() -> None:
    params = {"w": jnp.asarray(weight(128, 128))}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return x @ p["w"]

    sites = jlora.trace(model, params, jnp.ones((2, 128)))
    low = jlora.quantize(params, sites, {"w": "nf4"})
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(16))
    merged = [jlora.merge(*jlora.loftq(adapter, params, low, steps=steps))["w"] for steps in (1, 5)]
    once, often = (float(jnp.linalg.norm(w - params["w"])) for w in merged)
    assert often < 0.9 * once < 0.9 * float(jnp.linalg.norm(jlora.dequantize(low["w"]) - params["w"]))


def test_loftq_refuses_what_it_cannot_start() -> None:
    params, low = toy_model.params(), quantized("nf4")
    adapter = toy_model.adapter()
    with pytest.raises(ValueError, match="takes at least one step"):
        jlora.loftq(adapter, params, low, steps=0)
    with pytest.raises(ValueError, match="is not quantised"):
        jlora.loftq(adapter, params, params)
    with pytest.raises(ValueError, match="LoftQ initialises LoRA"):
        jlora.loftq(toy_model.adapter(jlora.DoRA(2)), params, low)


def test_explicit_meshes_are_refused() -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(nf4.quantize(jnp.asarray(weight(16, 4)), 0, 4, None), sharding)}
    with pytest.raises(NotImplementedError, match=r"use a mesh of AxisType\.Auto"):
        jlora.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))


def test_eight_devices_hold_parts_of_a_quantized_weight() -> None:
    """The factors are placed along the codes, and the result is that of one device."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    one = {"w": nf4.quantize(jnp.asarray(weight(128, 8)), 0, 64, None)}
    eight = {"w": jax.device_put(one["w"], sharding)}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"])

    x = jnp.asarray(weight(4, 128))
    adapter = toy_model.nonzero(jlora.init(jax.random.key(0), jlora.trace(model, one, x), jlora.DoRA(2)))
    sharded = jax.device_put(adapter, jlora.shardings(adapter, eight))
    assert sharded["w"].factors["a"].sharding.spec == jax.sharding.PartitionSpec("x", None)
    assert sharded["w"].factors["b"].sharding.spec == jax.sharding.PartitionSpec(None, "y")
    adapted = jax.jit(jlora.adapt(model, on_dense="error"))
    np.testing.assert_allclose(adapted(eight, sharded, x), adapted(one, adapter, x), atol=1e-5)


def test_restart_and_exchange_take_quantized_bases(tmp_path) -> None:
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


def test_a_format_of_the_users_own() -> None:
    params = jlora.quantize(
        toy_model.params(), toy_model.sites(), {"mix/kernel": lambda w, site: nf4.quantize(w, 0, 4, None)}
    )
    assert isinstance(params["mix"]["kernel"], NF4)
    assert params["mix"]["kernel"].scale.shape == (2, toy_model.WIDTH)
