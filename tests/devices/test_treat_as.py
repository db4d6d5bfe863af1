"""Custom kernels with a plain twin on eight devices: under `shard_map`, on Explicit meshes, with a quantised base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.extend import treat_as
from tests.support import toy_model

Tree = Any
IN, HIDDEN, LAYERS = 64, 128, 2
SPECS = {"up": P(None, "m"), "down": P("m"), "layers": P()}


def kernel(x_ref: Any, w_ref: Any, out_ref: Any) -> None:
    out_ref[...] = x_ref[...] @ w_ref[...]


@jax.custom_vjp
def by_kernel(x: jax.Array, w: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(x, w)


def backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    return g @ w.T, x.T @ g


by_kernel.defvjp(lambda x, w: (by_kernel(x, w), (x, w)), backward)


@jax.custom_vjp
def by_call(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


by_call.defvjp(lambda x, w: (x @ w, (x, w)), backward)
plain_product = lambda x, w: x @ w  # noqa: E731
products = {"pallas": treat_as(by_kernel, plain_product), "custom_vjp": treat_as(by_call, plain_product)}


def weights() -> Tree:
    sizes = {"up": (IN, HIDDEN), "down": (HIDDEN, IN), "layers": (LAYERS, IN, IN)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {k: jax.random.normal(key, n) / n[-2] ** 0.5 for key, (k, n) in zip(keys, sizes.items(), strict=True)}


X = jax.random.normal(jax.random.key(1), (8, IN))


def plain(p: Tree, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["up"]) @ p["down"]
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


def manual(product: Any, mesh: Any, *, check_vma: bool) -> Callable[[Tree, jax.Array], jax.Array]:
    """Tensor parallel by hand; each product is the kernel's."""

    def body(p: Tree, x: jax.Array) -> jax.Array:
        if check_vma:  # the gradient of a `custom_vjp` must vary as its operand does
            x = lax.pcast(x, "m", to="varying")
            p = {name: lax.pcast(w, "d", to="varying") for name, w in p.items()}
        x = lax.psum(product(jnp.tanh(product(x, p["up"])), p["down"]), "m")
        return lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, p["layers"])[0]

    return jax.shard_map(body, mesh=mesh, in_specs=(SPECS, P("d")), out_specs=P("d"), check_vma=check_vma)


def step(fun: Callable[..., jax.Array]) -> Any:
    loss = lambda adapter, params, x: jnp.square(fun(params, adapter, x)).mean()  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 2)))


def close(actual: Tree, expected: Tree) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-5 * float(np.abs(b).max()))


def law(fun: Any, mesh: Any, format_: str | None, *, method: jlora.Method | None = None) -> None:
    """Value and gradients, with respect to the adapter and to the input, are those of the merged plain program."""
    params = weights()
    sites = jlora.trace(plain, params, X)
    adapter = toy_model.random_adapter(sites, method or jlora.LoRA(3))
    base = jlora.quantize(params, sites, {".*": format_}) if format_ else params
    expected = step(lambda p, adapter, x: plain(jlora.merge(p, adapter), x))(adapter, base, X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        on_mesh = {k: jax.device_put(w, NamedSharding(mesh, SPECS[k])) for k, w in params.items()}
        assert {k: s.roles for k, s in jlora.trace(fun, on_mesh, x).items()} == {k: s.roles for k, s in sites.items()}
        if format_:
            on_mesh = jlora.quantize(on_mesh, sites, {".*": format_})
        adapter = jax.device_put(adapter, jlora.shardings(adapter, on_mesh))
        close(step(jlora.adapt(fun, on_dense="error"))(adapter, on_mesh, x), expected)


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind,) * 2)


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@pytest.mark.drawn(2)
@pytest.mark.parametrize("format_", [None, "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_shard_map(kind: str, format_: str | None) -> None:
    mesh = mesh_of(KINDS[kind])
    law(manual(products["pallas"], mesh, check_vma=False), mesh, format_)


@pytest.mark.parametrize("format_", [None, "nf4"])
def test_under_a_shard_map_with_types(format_: str | None) -> None:
    mesh = mesh_of(AxisType.Auto)
    law(manual(products["custom_vjp"], mesh, check_vma=True), mesh, format_)


@pytest.mark.parametrize("format_", [None, "nf4"])
def test_a_kernel_for_all_devices_of_an_explicit_mesh(format_: str | None) -> None:
    """The kernel is a `shard_map` of its own; the twin is a product whose result has a sharding."""
    mesh = mesh_of(AxisType.Explicit)

    def product(w_spec: P, out: P) -> Any:
        def op(x: jax.Array, w: jax.Array) -> jax.Array:
            specs = (P("d", w_spec[0]), w_spec)

            def body(x: jax.Array, w: jax.Array) -> jax.Array:
                y = by_call(x, w)
                return lax.psum(y, "m") if w_spec[0] else y

            return jax.shard_map(body, in_specs=specs, out_specs=out, check_vma=False)(x, w)

        return treat_as(op, lambda x, w: jnp.einsum("bi,io->bo", x, w, out_sharding=out))

    column, row, whole = (
        product(*specs)
        for specs in ((P(None, "m"), P("d", "m")), (P("m", None), P("d", None)), (P(None, None), P("d", None)))
    )

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        x = row(jnp.tanh(column(x, p["up"])), p["down"])
        return lax.scan(lambda x, w: (jnp.tanh(whole(x, w)), None), x, p["layers"])[0]

    law(fun, mesh, format_)


@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_a_quantised_base_on_one_device(format_: str) -> None:
    def fun(p: Tree, x: jax.Array) -> jax.Array:
        product = products["pallas"]
        x = product(jnp.tanh(product(x, p["up"])), p["down"])
        return lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, p["layers"])[0]

    law(fun, jax.make_mesh((1, 1), ("d", "m"), axis_types=(AxisType.Auto,) * 2), format_)
