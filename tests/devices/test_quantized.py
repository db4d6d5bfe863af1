"""Quantised bases on eight devices: parts are cut as their weights are, and dequantised where they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.quantized import GGUF, nf4
from tests.support import compiled as report
from tests.support import int8_rows, toy_model

Tree = Any
WIDTH, HIDDEN, LAYERS, ROWS = 256, 768, 2, 8
SIZES = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "layers": (LAYERS, WIDTH, WIDTH), "embed": (512, WIDTH)}
SPECS = {"up": P(None, "m"), "down": P("m"), "layers": P(None, "m"), "embed": P()}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def gguf(transposed: bool) -> Callable[..., Any]:
    def quantize(weight: jax.Array, site: Any) -> GGUF:
        *stack, rows, columns = weight.mT.shape if transposed else weight.shape
        empty = GGUF(jnp.zeros((*stack, rows, columns // 32 * 34), jnp.uint8), "Q8_0", transposed, weight.dtype)
        return empty.requantize(weight)

    return quantize


FORMATS = {"nf4": "nf4", "int8": "int8", "int4": "int4", "gguf": gguf(False), "gguf_transposed": gguf(True)}


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("int8", "int4", "gguf")]


def mesh_of(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind,) * 2)


def weights() -> Tree:
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    return {k: jax.random.normal(key, n) / n[-2] ** 0.5 for key, (k, n) in zip(keys, SIZES.items(), strict=True)}


def plain(p: Tree, tokens: jax.Array) -> jax.Array:
    x = p["embed"][tokens]
    x = jnp.tanh(x @ p["up"]) @ p["down"]
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


def manual(p: Tree, tokens: jax.Array) -> jax.Array:
    """Tensor parallel by hand: a column-parallel product, a row-parallel one, and a scan over row-parallel layers."""

    def body(p: Tree, tokens: jax.Array) -> jax.Array:
        x = p["embed"][tokens]
        x = lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "m")

        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            start = lax.axis_index("m") * w.shape[0]
            part = lax.dynamic_slice_in_dim(x, start, w.shape[0], 1)
            return jnp.tanh(lax.psum(part @ w, "m")), None

        return lax.scan(layer, x, p["layers"])[0]

    return jax.shard_map(body, in_specs=(SPECS, P("d")), out_specs=P("d"))(p, tokens)


def base_and_adapter(format_: Any, method: jlora.Method | None = None) -> tuple[Tree, jlora.Adapter, jax.Array]:
    params, tokens = weights(), jnp.arange(ROWS) * 7 % 512
    sites = jlora.trace(plain, params, tokens)
    adapter = toy_model.nonzero(jlora.init(jax.random.key(1), sites, method or jlora.LoRA(3)))
    return jlora.quantize(params, sites, {".*": format_}), adapter, tokens


def step(fun: Callable[..., jax.Array]) -> Any:
    def loss(adapter: jlora.Adapter, params: Tree, tokens: jax.Array) -> jax.Array:
        return jnp.square(fun(params, adapter, tokens)).mean()

    return jax.jit(jax.value_and_grad(loss))


def merged(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, adapter, tokens: fun(jlora.merge(params, adapter), tokens)


def close(actual: Tree, expected: Tree) -> None:
    largest = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-5 * largest)


def placed(params: Tree, adapter: jlora.Adapter, tokens: jax.Array, mesh: Any) -> Any:
    """Codes and scales where their weights belong, along the axes that the mesh divides."""

    def place(weight: Any, spec: P) -> Any:
        def put(part: jax.Array) -> jax.Array:
            entries = (*spec, *[None] * (part.ndim - len(spec)))
            if getattr(weight, "transposed", False):
                entries = (*entries[:-2], entries[-1], entries[-2])
            fits = [
                entry if entry and n % mesh.shape[entry] == 0 else None
                for n, entry in zip(part.shape, entries, strict=True)
            ]
            return jax.device_put(part, NamedSharding(mesh, P(*fits)))

        return jax.tree.map(put, weight)

    params = {name: place(leaf, SPECS[name]) for name, leaf in params.items()}
    adapter = jax.device_put(adapter, jlora.shardings(adapter, params))
    return adapter, params, jax.device_put(tokens, NamedSharding(mesh, P("d")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nf4", "gguf_transposed", *NIGHTLY])
def test_the_law_inside_shard_map(name: str, kind: str) -> None:
    params, adapter, tokens = base_and_adapter(FORMATS[name])
    expected = step(merged(plain))(adapter, params, tokens)
    mesh = mesh_of(KINDS[kind])
    with jax.set_mesh(mesh):
        args = placed(params, adapter, tokens, mesh)
        actual = step(jlora.adapt(manual, on_dense="error"))(*args)
    close(actual, expected)


@pytest.mark.parametrize("name", ["gguf_transposed", pytest.param("nf4", marks=pytest.mark.nightly), *NIGHTLY])
def test_the_law_on_an_explicit_mesh(name: str) -> None:
    """Without `shard_map`: products, a scan and a lookup of a base that was quantised on the mesh, and its merge."""

    def fun(p: Tree, tokens: jax.Array) -> jax.Array:
        x = p["embed"].at[tokens].get(out_sharding=P("d"))
        x = jnp.tanh(jnp.einsum("bi,ij->bj", x, p["up"], out_sharding=P("d", "m")))
        x = jnp.einsum("bi,ij->bj", x, p["down"], out_sharding=P("d"))
        layer = lambda x, w: (jnp.tanh(jnp.einsum("bi,ij->bj", x, w, out_sharding=P("d"))), None)  # noqa: E731
        return lax.scan(layer, x, p["layers"])[0]

    params, adapter, tokens = base_and_adapter(FORMATS[name])
    expected = step(merged(plain))(adapter, params, tokens)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        on_mesh = {k: jax.device_put(w, NamedSharding(mesh, SPECS[k])) for k, w in weights().items()}
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("d")))
        sites = jlora.trace(fun, on_mesh, tokens)
        quantized = jlora.quantize(on_mesh, sites, {".*": FORMATS[name]})
        for leaf in quantized.values():
            parts = jax.tree.leaves(leaf)
            assert all(part.sharding.mesh.axis_types == (AxisType.Explicit,) * 2 for part in parts)
        traced = jlora.trace(fun, quantized, tokens)["up"].sharding
        assert isinstance(traced, NamedSharding)
        assert traced.spec == SPECS["up"]
        assert any("m" in part.sharding.spec for part in jax.tree.leaves(quantized["up"]))
        adapter = jax.device_put(adapter, jlora.shardings(adapter, quantized))
        actual = step(jlora.adapt(fun, on_dense="error"))(adapter, quantized, tokens)
        close(actual, expected)
        dense = jlora.merge(quantized, adapter)
        assert dense["up"].sharding.spec == SPECS["up"]
        close(dense, jlora.merge(params, jax.device_get(adapter)))
        again = jlora.merge(quantized, adapter, requantize=True)
        one = jlora.merge(params, jax.device_get(adapter), requantize=True)
        assert [leaf.sharding for leaf in jax.tree.leaves(again)] == [q.sharding for q in jax.tree.leaves(quantized)]
        close(jlora.dequantize(again), jlora.dequantize(one))


def test_no_dense_weight_in_the_compiled_program() -> None:
    """Of a stack one layer at a time is dequantised, and of that the piece of one device."""
    layers, width = 16, 512
    stack = jax.random.normal(jax.random.key(0), (layers, width, width)) / width**0.5
    x = jnp.ones((8, width))
    mesh = mesh_of()

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return lax.all_gather(jnp.tanh(x @ w), "m", axis=1, tiled=True), None

        body = lambda w, x: lax.scan(layer, x, w)[0]  # noqa: E731
        specs = (P(None, None, "m"), P("d"))
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=False)(p["w"], x)

    sites = jlora.trace(fun, {"w": stack}, x)
    adapter = toy_model.nonzero(jlora.init(jax.random.key(1), sites, jlora.LoRA(3)))
    params = jlora.quantize({"w": stack}, sites, {"w": "nf4"})
    compiled = step(jlora.adapt(fun, on_dense="error")).lower(adapter, params, x).compile()
    floats = re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", report.text(compiled))
    largest = max(math.prod(map(int, dims.split(","))) for dims in floats)
    assert largest <= width * width // 2
    assert report.memory(compiled).temp_size_in_bytes < stack.nbytes / 2 / 2


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
    adapter = toy_model.nonzero(jlora.init(jax.random.key(1), sites, jlora.LoRA(3)))
    close(jax.jit(jlora.adapt(fun))(params, adapter, x), fun(jlora.merge(params, adapter), x))


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


def test_loftq_inside_shard_map() -> None:
    params, tokens = weights(), jnp.arange(ROWS) * 7 % 512
    sites = jlora.trace(plain, params, tokens)
    adapter = jlora.init(jax.random.key(1), sites, jlora.LoRA(3))
    quantized, adapter = jlora.loftq(adapter, params, jlora.quantize(params, sites, {".*": "nf4"}), steps=1)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        actual = step(jlora.adapt(manual, on_dense="error"))(*placed(quantized, adapter, tokens, mesh))
    close(actual, step(merged(plain))(adapter, quantized, tokens))
