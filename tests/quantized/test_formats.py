"""Formats by their definitions, and beside qwix and GGUF."""

from __future__ import annotations

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
from tests.support import toy_model
from tests.support.quantized import quantized, weight


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
    errors = [float(jnp.linalg.norm(actual - values)) for actual in (array.dequantize(), plain)]
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


def test_a_users_format() -> None:
    params = jlora.quantize(
        toy_model.params(), toy_model.sites(), {"mix/kernel": lambda w, site: nf4.quantize(w, 0, 4, None)}
    )
    assert isinstance(params["mix"]["kernel"], NF4)
    assert params["mix"]["kernel"].scale.shape == (2, toy_model.WIDTH)


@pytest.mark.parametrize("group", [32, 64])
def test_qalora_merges_into_the_minima_of_q4_1(group: int) -> None:
    """Codes and scales keep their bits, also where no entry of a block has the lowest or the highest code."""
    values = weight(6, 128)
    packed = GGUF(jnp.zeros((6, 80), jnp.uint8), "Q4_1", transposed=True)
    base = packed.requantize(jnp.asarray(values.T))
    blocks = np.array(base.data).reshape(6, 4, 20)
    blocks[0, 0, 4:] = 0x55
    blocks[1, 2, 4:] = 0x69
    base = GGUF(jnp.asarray(blocks.reshape(6, 80)), "Q4_1", transposed=True)
    params, x = {"w": base}, jnp.ones((2, 128))
    sites = jlora.trace(lambda p, x: x @ p["w"], params, x)
    adapter = toy_model.random_adapter(sites, jlora.QALoRA(2, group))
    merged = jlora.merge(params, adapter, requantize=True)["w"]
    after = np.asarray(merged.data).reshape(6, 4, 20)
    np.testing.assert_array_equal(after[..., :2], blocks[..., :2])
    np.testing.assert_array_equal(after[..., 4:], blocks[..., 4:])
    want = np.asarray(jlora.merge(params, adapter)["w"])
    np.testing.assert_allclose(merged.dequantize(), want, atol=1e-3 * np.abs(want).max())
    assert np.abs(want - np.asarray(base.dequantize())).max() > 0.1
    lora = toy_model.random_adapter(sites, jlora.LoRA(2))
    changed = np.asarray(jlora.merge(params, lora, requantize=True)["w"].data).reshape(6, 4, 20)
    assert (changed[..., 4:] != blocks[..., 4:]).any((0, 1)).all()
