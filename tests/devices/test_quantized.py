"""Quantised bases on eight devices: parts are cut as their weights are, and dequantised where they are used."""

from __future__ import annotations

import functools
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
from jlora.quantized import GGUF
from tests.support import compiled as report
from tests.support import toy_model

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


@functools.cache
def base_and_adapter(name: str) -> tuple[Tree, jlora.Adapter, jax.Array]:
    """The parameters in a format, an adapter and tokens."""
    params, tokens = weights(), jnp.arange(ROWS) * 7 % 512
    sites = jlora.trace(plain, params, tokens)
    quantize = jax.jit(lambda params: jlora.quantize(params, sites, {".*": FORMATS[name]}))
    return quantize(params), toy_model.random_adapter(sites, jlora.LoRA(3)), tokens


@functools.cache
def reference(name: str) -> Any:
    """The loss on merged weights, on one device, and its gradient."""
    params, adapter, tokens = base_and_adapter(name)
    return step(merged(plain))(adapter, params, tokens)


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


@pytest.mark.drawn(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nf4", "gguf_transposed", *NIGHTLY])
def test_the_law_inside_shard_map(name: str, kind: str) -> None:
    params, adapter, tokens = base_and_adapter(name)
    mesh = mesh_of(KINDS[kind])
    with jax.set_mesh(mesh):
        args = placed(params, adapter, tokens, mesh)
        actual = step(jlora.adapt(manual, on_dense="error"))(*args)
    close(actual, reference(name))


@pytest.mark.parametrize("name", ["gguf_transposed", pytest.param("nf4", marks=pytest.mark.nightly), *NIGHTLY])
def test_the_law_on_an_explicit_mesh(name: str) -> None:
    """Without `shard_map`: products, a scan and a lookup of a base that was quantised on the mesh, and its merge."""

    def fun(p: Tree, tokens: jax.Array) -> jax.Array:
        x = p["embed"].at[tokens].get(out_sharding=P("d"))
        x = jnp.tanh(jnp.einsum("bi,ij->bj", x, p["up"], out_sharding=P("d", "m")))
        x = jnp.einsum("bi,ij->bj", x, p["down"], out_sharding=P("d"))
        layer = lambda x, w: (jnp.tanh(jnp.einsum("bi,ij->bj", x, w, out_sharding=P("d"))), None)  # noqa: E731
        return lax.scan(layer, x, p["layers"])[0]

    params, adapter, tokens = base_and_adapter(name)
    expected, expected_merge = reference(name), jax.jit(jlora.merge)(params, adapter)
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
        close(dense, expected_merge)
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
    adapter = toy_model.random_adapter(sites, jlora.LoRA(3))
    params = jlora.quantize({"w": stack}, sites, {"w": "nf4"})
    compiled = step(jlora.adapt(fun, on_dense="error")).lower(adapter, params, x).compile()
    floats = re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", report.text(compiled))
    largest = max(math.prod(map(int, dims.split(","))) for dims in floats)
    assert largest <= width * width // 2
    assert report.memory(compiled).temp_size_in_bytes < stack.nbytes / 2 / 2


def test_loftq_inside_shard_map() -> None:
    params, tokens = weights(), jnp.arange(ROWS) * 7 % 512
    sites = jlora.trace(plain, params, tokens)
    adapter = jlora.init(jax.random.key(1), sites, jlora.LoRA(3))
    quantized, adapter = jlora.loftq(adapter, params, jlora.quantize(params, sites, {".*": "nf4"}), steps=1)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        actual = step(jlora.adapt(manual, on_dense="error"))(*placed(quantized, adapter, tokens, mesh))
    close(actual, step(merged(plain))(adapter, quantized, tokens))
