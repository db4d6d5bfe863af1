"""Quantised weights that a program's own `shard_map` cuts: which cuts fit blocks, and which raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from jlora.quantized import nf4
from tests.devices.test_quantized import Tree, close, gguf, mesh_of
from tests.support import int8_rows, toy_model


def cut_by_two(weight: Any, axis: int, *, before: Callable[[jax.Array], jax.Array] = lambda w: w) -> Any:
    """A product whose weight is split in two along one of its axes: the program, its parameters and its input."""
    spec = P("m", None) if axis == 0 else P(None, "m")

    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        w = w.astype(x.dtype)
        return lax.psum(x @ w, "m") if axis == 0 else lax.all_gather(x @ w, "m", axis=1, tiled=True)

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        specs = (spec, P(None, "m") if axis == 0 else P())
        return jax.shard_map(body, mesh=mesh_of(), in_specs=specs, out_specs=P(), check_vma=False)(before(p["w"]), x)

    x = jax.random.normal(jax.random.key(2), (4, jax.eval_shape(before, jnp.zeros(weight.shape)).shape[0]))
    return fun, {"w": weight}, x


def law(fun: Any, params: Tree, x: jax.Array) -> None:
    sites = jlora.trace(fun, params, x)
    adapter = toy_model.random_adapter(sites, jlora.LoRA(3))
    sides = jax.jit(lambda *args: (jlora.adapt(fun)(*args), fun(jlora.merge(*args[:2]), *args[2:])))
    close(*sides(params, adapter, x))


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("format_", "shape", "axis", "fits"),
    [
        (lambda w: nf4.quantize(w, 0), (192, 64), 0, 32),
        (lambda w: nf4.quantize(w, 0), (64, 64), 0, 32),
        (lambda w: nf4.quantize(w, 1), (32, 64 * 3), 1, 32),
        (lambda w: gguf(True)(w, None), (96, 64), 0, 16),
    ],
)
def test_a_block_that_straddles_a_cut(format_: Any, shape: tuple[int, int], axis: int, fits: int) -> None:
    weight = jax.random.normal(jax.random.key(0), shape)
    fun, params, x = cut_by_two(format_(weight), axis)
    sites = jlora.trace(fun, {"w": weight}, x)
    adapter = jlora.init(jax.random.key(1), sites, jlora.LoRA(3))
    with pytest.raises(ValueError, match=rf"w \({shape[0]}, {shape[1]}\): axis {axis}.*straddles.* {fits} entries"):
        jlora.adapt(fun)(params, adapter, x)
    law(*cut_by_two(nf4.quantize(weight, axis, block=fits), axis))


def test_int4_tiles_that_straddle_a_cut() -> None:
    weight = jax.random.normal(jax.random.key(0), (96, 16))
    fun, plain_params, x = cut_by_two(weight, 0)
    sites = jlora.trace(fun, plain_params, x)
    adapter = jlora.init(jax.random.key(1), sites, jlora.LoRA(3))
    with pytest.raises(ValueError, match=r"axis 0 is cut into 2 pieces of 48 entries, but 32 .* blocks of 16"):
        jlora.adapt(fun)(jlora.quantize(plain_params, sites, {"w": "int4"}), adapter, x)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("groups", [1, 3, pytest.param(96, marks=pytest.mark.nightly)])
def test_scales_of_scales_that_straddle_a_cut(groups: int, axis: int) -> None:
    """Groups of scales are no obstacle: a group that straddles a cut is repeated."""
    weight = jax.random.normal(jax.random.key(0), (256, 96))
    quantized = nf4.quantize(weight, 0, group=96 // groups)
    assert quantized.unit is not None
    assert quantized.unit.shape == (4, groups)
    law(*cut_by_two(quantized, axis))


BEFORE = {
    "transposed": lambda w: w.T,
    "copied": lambda w: jnp.array(w, copy=True),
    "reshaped": lambda w: w.reshape(2, -1, w.shape[1]).reshape(w.shape),
    "joined": lambda w: jnp.concatenate([w, w], axis=1),
}


@pytest.mark.drawn(3)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", BEFORE)
def test_a_weight_that_the_program_changed_before(name: str, axis: int) -> None:
    """What does not depend on the size of the weight is done in pieces; otherwise the base is dequantised before."""
    weight = nf4.quantize(jax.random.normal(jax.random.key(0), (128, 256)), 0)
    fun, params, x = cut_by_two(weight, axis, before=BEFORE[name])
    law(fun, params, x)


def test_a_format_that_cannot_be_cut_is_dequantised_before() -> None:
    weight = jax.random.normal(jax.random.key(0), (64, 32))
    law(*cut_by_two(int8_rows.rounded(np.asarray(weight)), 1))


def test_a_pipeline_of_quantised_layers() -> None:
    """Each device holds one layer of the stack."""
    width = 64
    stack = jax.random.normal(jax.random.key(0), (8, width, width)) / width**0.5
    mesh = jax.make_mesh((8,), ("pipe",), axis_types=(AxisType.Auto,))

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        def body(w: jax.Array, x: jax.Array) -> jax.Array:
            for _ in range(8):
                x = lax.ppermute(jnp.tanh(x @ w[0]), "pipe", [(k, (k + 1) % 8) for k in range(8)])
            return x[None]

        return jax.shard_map(body, mesh=mesh, in_specs=(P("pipe"), P()), out_specs=P("pipe"), check_vma=False)(
            p["w"], x
        )

    x = jax.random.normal(jax.random.key(2), (4, width))
    sites = jlora.trace(fun, {"w": stack}, x)
    law(fun, jlora.quantize({"w": stack}, sites, {"w": "nf4"}), x)


def test_weights_gathered_by_hand() -> None:
    """The weight is kept in pieces, and gathered where it is used."""
    weight = jax.random.normal(jax.random.key(0), (512, 64))

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        body = lambda w, x: x @ lax.all_gather(w, "d", tiled=True)  # noqa: E731
        return jax.shard_map(body, mesh=mesh_of(), in_specs=(P("d"), P("d")), out_specs=P("d"))(p["w"], x)

    x = jax.random.normal(jax.random.key(2), (8, 512))
    law(fun, {"w": nf4.quantize(weight, 0)}, x)
