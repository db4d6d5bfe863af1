"""The law on eight devices: every layout of `layouts.py`, values and gradients against one device, and what is sent.

On meshes of both kinds of axes, by hand under `jax.shard_map`, and under `jax.pmap`. What an adapted program sends
beyond its base is read from the compiled program: it is as thin as the rank.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.support import compiled as report
from tests.support import toy_model
from tests.support.layouts import BATCH, LAYOUTS, MANUAL, WIDTH, Layout, block

Tree = Any
RANK = 3  # no other size here: an array that has it is one of the branch
TOLERANCE = 1e-5  # in units of the largest entry

METHODS = {
    "dora": jlora.DoRA(RANK),
    "loha": jlora.LoHa(RANK),
    "lokr": jlora.LoKr(RANK),
    "additive": jlora.Additive(2),
    "ia3": jlora.IA3(),
    "ia3_in": jlora.IA3("in"),
    "vera": jlora.VeRA(RANK),
}
KINDS = [AxisType.Auto, AxisType.Explicit]
NAMED = {layout.name: layout for layout in (*LAYOUTS, *MANUAL)}
CASES = [*itertools.product(LAYOUTS, KINDS), *itertools.product(MANUAL, KINDS[:1]), (MANUAL[0], KINDS[1])]
FSDP_X_TENSOR = [
    *((NAMED["fsdp_x_tensor"], kind) for kind in KINDS),
    pytest.param(NAMED["manual_fsdp_x_tensor"], KINDS[0], marks=pytest.mark.nightly),
]


def named(value: Layout | AxisType) -> str:
    return value.name.lower()


def step(fun: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Value and gradients, with respect to the adapter and to the inputs."""
    return jax.value_and_grad(lambda adapter, params, x: jnp.square(fun(params, adapter, x)).mean(), (0, 2))


def close(actual: Tree, expected: Tree) -> None:
    largest = max(float(np.abs(a).max()) for a in jax.tree.leaves(expected[1]))
    assert np.allclose(actual[0], expected[0], rtol=TOLERANCE)
    for a, b in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=TOLERANCE * largest)


@functools.cache
def on_one_device(layout: Layout, method: jlora.Method) -> tuple[Tree, Tree]:
    """An adapter without zeros, and what the merged program and its gradients are."""
    params, x = layout.values()
    sites = jlora.trace(layout.plain, params, x)
    adapter = toy_model.random_adapter(sites, method)
    merged = jax.jit(step(lambda params, adapter, x: layout.plain(jlora.merge(params, adapter), x)))
    return adapter, jax.device_get(merged(adapter, params, x))


SENDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
Sent = collections.Counter[tuple[str, tuple[int, ...]]]


def sent(compiled: Any) -> Sent:
    """Every collective of a compiled program, with the shape of what it sends, piece by piece."""
    counts: Sent = collections.Counter()
    for line in report.text(compiled).splitlines():
        for result, name in re.findall(rf" = (.*?) ({SENDS})(?:-start)?\(", line):
            for dims in re.findall(r"\w+\[([\d,]*)\]", result):
                counts[name, tuple(int(n) for n in dims.split(",") if n)] += 1
    return counts


@functools.cache
def sent_by_base(layout: Layout, kind: AxisType) -> Sent:
    """What the base sends for its value and its gradient with respect to the inputs alone."""
    mesh = layout.mesh(kind)
    base = jax.value_and_grad(lambda x, params: jnp.square(layout.fun(params, x)).mean())
    with jax.set_mesh(mesh):
        return sent(jax.jit(base).lower(*layout.abstract(mesh)[::-1]).compile())


def hold(layout: Layout, kind: AxisType, method: jlora.Method) -> Sent:
    """Factors that lie where their weights do give what merged weights give on one device, and so do gradients.

    Returns what the program sends.
    """
    adapter, expected = on_one_device(layout, method)
    params, x = layout.values()
    places, place = layout.shardings(layout.mesh(kind))
    with jax.set_mesh(layout.mesh(kind)):
        params, x = jax.device_put(params, places), jax.device_put(x, place)
        adapter = jax.device_put(adapter, jlora.shardings(adapter, params))
        traced = jlora.trace(layout.fun, params, x)
        compiled = jax.jit(step(jlora.adapt(layout.fun, on_dense="error"))).lower(adapter, params, x).compile()
        actual = compiled(adapter, params, x)
    close(actual, expected)
    assert {path: site.roles for path, site in traced.items()} == {path: u.roles for path, u in adapter.items()}
    return sent(compiled)


@pytest.mark.drawn(3)
@pytest.mark.parametrize(("layout", "kind"), CASES, ids=named)
def test_lora(layout: Layout, kind: AxisType) -> None:
    """The law, and that all that is sent beyond what the base sends is as thin as the rank."""
    base, adapted = sent_by_base(layout, kind), hold(layout, kind, jlora.LoRA(RANK))
    assert base, "the base sends something, or this is no layout"
    assert all(RANK in dims for _, dims in adapted - base), adapted - base
    nothing_large(layout, base, adapted, on_one_device(layout, jlora.LoRA(RANK))[0])


@pytest.mark.drawn(3)
@pytest.mark.parametrize(("layout", "kind"), FSDP_X_TENSOR, ids=named)
@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, layout: Layout, kind: AxisType) -> None:
    adapted = hold(layout, kind, METHODS[name])
    nothing_large(layout, sent_by_base(layout, kind), adapted, on_one_device(layout, METHODS[name])[0])


def nothing_large(layout: Layout, base: Sent, adapted: Sent, adapter: Tree) -> None:
    """Nothing sent is larger than the base's largest, but for sums of gradients; no other weight is gathered."""
    factors = {piece for a in jax.tree.leaves(adapter) for piece in pieces(a.shape)}
    others = {dims for name, dims in adapted - base if name != "all-reduce" or tuple(sorted(dims)) not in factors}
    assert max(map(math.prod, others), default=0) <= max(math.prod(dims) for _, dims in base)
    whole = {piece for shape in layout.sizes.values() for piece in pieces(shape) if math.prod(piece) > BATCH * WIDTH}
    gathered, by_base = ({tuple(sorted(dims)) for name, dims in s if name == "all-gather"} for s in (adapted, base))
    assert gathered & whole <= by_base


def pieces(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes, in any order, of an array's pieces on eight devices."""
    each = [[n // k for k in (1, 2, 4, 8) if n % k == 0] for n in shape]
    return {tuple(sorted(piece)) for piece in itertools.product(*each)}


def test_pmap_inside_and_outside() -> None:
    """A program that maps over devices, and one that is mapped: replicas whose gradients are averaged."""
    layout = NAMED["data"]
    params, x = layout.values()
    adapter, expected = on_one_device(layout, jlora.LoRA(RANK))
    parts = x.reshape(8, 1, *x.shape[1:])

    inside = jax.pmap(block(), in_axes=(None, 0))
    value, (gradients, to_x) = step(jlora.adapt(inside, on_dense="error"))(adapter, params, parts)
    close((value, (gradients, to_x.reshape(x.shape))), expected)

    @functools.partial(jax.pmap, axis_name="batch")
    def replica(adapter: Tree, params: Tree, x: jax.Array) -> Any:
        value, (gradients, to_x) = step(jlora.adapt(block(), on_dense="error"))(adapter, params, x)
        return jax.lax.pmean((value, gradients), "batch"), to_x / 8

    (value, gradients), to_x = replica(*jax.tree.map(lambda a: jnp.stack([a] * 8), (adapter, params)), parts)
    for k in range(8):
        close((value[k], (jax.tree.map(lambda a, k=k: a[k], gradients), to_x.reshape(x.shape))), expected)


@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize(("name", "letters"), [("up", "btd,df->btf"), ("down", "btf,fd->btd")])
def test_column_and_row_parallel_sites(name: str, letters: str, kind: AxisType) -> None:
    """Forward, a column-parallel site sends nothing, and a row-parallel one its own sum and one that is r wide."""
    layout = NAMED["tensor"]
    mesh = layout.mesh(kind)
    rows = "model" if name == "down" else None

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        out = P(None, None, None if rows else "model") if kind == AxisType.Explicit else None
        return jnp.einsum(letters, x, p[name], out_sharding=out)

    params = {name: layout.abstract(mesh)[0][name]}
    lead, (n_in, n_out) = layout.x[:2], layout.sizes[name]
    x = jax.ShapeDtypeStruct((*lead, n_in), jnp.float32, sharding=NamedSharding(mesh, P(None, None, rows)))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), jlora.trace(fun, params, x), jlora.LoRA(RANK)))
        places = jlora.shardings(shapes, params)
        adapter = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)
        base = sent(jax.jit(fun).lower(params, x).compile())
        adapted = sent(jax.jit(jlora.adapt(fun, on_dense="error")).lower(params, adapter, x).compile())
    own, thin = ("all-reduce", (*lead, n_out)), ("all-reduce", (*lead, RANK))
    assert base == (collections.Counter([own]) if rows else {})
    assert adapted == (collections.Counter([own, thin]) if rows else {})


# Factors are made where they lie.


@pytest.mark.parametrize("method", [jlora.LoRA(RANK), *METHODS.values()][:5], ids=lambda m: type(m).__name__)
def test_factors_are_made_in_pieces(method: jlora.Method) -> None:
    """No array of the compiled `init` is as large as a factor that is divided, and none is sent."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sizes = {"up": (2, 4096, 6144), "down": (2, 6144, 4096), "head": (4096, 640)}
    specs = {"up": P(None, "data", "model"), "down": P(None, "model", "data"), "head": P("data", "model")}
    params = {k: jax.ShapeDtypeStruct(n, jnp.float32, sharding=NamedSharding(mesh, specs[k])) for k, n in sizes.items()}

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, (p["up"], p["down"]))[0] @ p["head"]

    sites = jlora.trace(fun, params, jax.ShapeDtypeStruct((8, 4096), jnp.float32))
    make = functools.partial(jlora.init, sites=sites, targets=method)
    shapes = jax.eval_shape(make, jax.random.key(0))
    places = jlora.shardings(shapes, params)
    compiled = jax.jit(make, out_shardings=places).lower(jax.random.key(0)).compile()

    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
    parts = [(np.prod(a.shape), np.prod(s.shard_shape(a.shape)), s.is_fully_replicated) for a, s in pairs]
    made = [
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", report.text(compiled))
    ]
    assert max(made) == max(part for _, part, _ in parts)
    assert max(made) < max((whole for whole, _, replicated in parts if not replicated), default=np.inf)
    assert not re.search(rf" ({SENDS})", report.text(compiled))
    assert report.memory(compiled).output_size_in_bytes < 1.01 * 4 * sum(part for _, part, _ in parts) + 1024
