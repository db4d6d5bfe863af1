"""The law over random dimension numbers, shapes and dtypes: products, convolutions, lookups, and what precedes them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jax import lax

import jlora
from tests.support.agreement import F32, adapter_for, check_law, random
from tests.support.random_chains import Chain, any_chains, apply, factored_chains, seeds

_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
FIXED = settings(deadline=None, derandomize=True, database=None, max_examples=30, suppress_health_check=_HEALTH)
CHAINS = settings(FIXED, max_examples=40)
FRESH = settings(FIXED, derandomize=False, max_examples=1500, print_blob=True)
DTYPES = ("float32", "float32", "bfloat16", "float16")


def tolerance(*dtypes: Any) -> float:
    """What the two sides may differ by, relative to the largest entry.

    In float32 it is the law's own bound. In a narrow dtype, five numbers are rounded, each by half an epsilon at most:
    the product onto the rank, the product from it and the sum; the merged weight and its product. No sum cancels,
    because in these dtypes all numbers are positive.
    """
    return max(F32, *(2.5 * float(jnp.finfo(dtype).eps) for dtype in dtypes))


def law(f: Any, params: dict[str, Any], targets: Any, seed: int, *args: Any, bound: float, factored: bool) -> None:
    """Adapts what `targets` names, and checks the law (and that nothing is formed) on random numbers.

    Shapes among `params` and `args` stand for arrays of random numbers. They have no signs where sums might cancel by
    so much that rounding alone would exceed the bound: in narrow dtypes, and where a tree has a handful of entries.
    """
    few = any(leaf.size < 8 for leaf in jax.tree.leaves((params["w"], jax.eval_shape(f, params, *args))))
    rng, positive = np.random.default_rng(seed), few or bound > F32

    def filled(leaf: Any) -> jax.Array:
        return leaf if isinstance(leaf, jax.Array) else random(rng, leaf.shape, leaf.dtype, positive=positive)

    params, args = jax.tree.map(filled, (params, args))
    adapter = adapter_for(jlora.trace(f, params, *args), targets, rng, positive=positive)
    if factored:
        assert jlora.explain(f, params, adapter, *args).dense == ()
    check_law(f, params, adapter, *args, bound=bound, on_dense="error" if factored else "allow")


@dataclasses.dataclass(frozen=True)
class Dot:
    """A product with the weight on either side."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    x_in: tuple[int, ...]
    w_in: tuple[int, ...]
    x_batch: tuple[int, ...]
    w_batch: tuple[int, ...]
    w_first: bool
    x_dtype: str
    w_dtype: str
    out_dtype: str | None
    precision: Any
    rank: int
    seed: int


@st.composite
def dots(draw: st.DrawFn) -> Dot:
    def sizes(least: int, most: int, values: tuple[int, ...] = (1, 2, 3, 4, 5)) -> list[int]:
        return draw(st.lists(st.sampled_from(values), min_size=least, max_size=most))

    inner, batch, x_free, w_free = sizes(1, 3), sizes(0, 2), sizes(0, 3, (0, 1, 2, 3, 4)), sizes(1, 3)
    w_first = draw(st.booleans())
    shapes, places = [], []
    for free in (x_free, w_free):
        joint = [*inner, *batch, *free]
        order = draw(st.permutations(range(len(joint))))
        shapes.append(tuple(joint[k] for k in order))
        places.append([order.index(k) for k in range(len(joint))])
    split = len(inner) + len(batch)
    x_dtype = draw(st.sampled_from((*DTYPES, "int8")))
    same = (x_dtype, x_dtype) if x_dtype != "int8" else ()
    w_dtype = draw(st.sampled_from((*same, *DTYPES)))
    out_dtype = draw(st.sampled_from((None, None, "float32", *same, w_dtype)))
    precision = draw(st.sampled_from((None, None, "highest", ("default", "highest"))))
    x_shape, w_shape = shapes
    return Dot(
        x_shape,
        w_shape,
        tuple(places[0][: len(inner)]),
        tuple(places[1][: len(inner)]),
        tuple(places[0][len(inner) : split]),
        tuple(places[1][len(inner) : split]),
        w_first,
        x_dtype,
        w_dtype,
        out_dtype,
        precision,
        draw(st.integers(1, min(math.prod(inner), math.prod(w_free), 4))),
        draw(seeds()),
    )


def dot_law(case: Dot) -> None:
    def f(params: Any, x: jax.Array) -> jax.Array:
        inner, batch = (case.x_in, case.w_in), (case.x_batch, case.w_batch)
        dims: Any = (inner[::-1], batch[::-1]) if case.w_first else (inner, batch)
        operands = (params["w"], x) if case.w_first else (x, params["w"])
        return lax.dot_general(*operands, dims, precision=case.precision, preferred_element_type=case.out_dtype)

    w, x = jax.ShapeDtypeStruct(case.w_shape, case.w_dtype), jax.ShapeDtypeStruct(case.x_shape, case.x_dtype)
    bound = tolerance(w.dtype, jax.eval_shape(f, {"w": w}, x).dtype)  # a narrow activation alone costs no precision
    law(f, {"w": w}, {"w": jlora.LoRA(rank=case.rank, alpha=3.0)}, case.seed, x, bound=bound, factored=True)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of any rank, stride, padding, dilation, grouping and layout."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    numbers: lax.ConvDimensionNumbers
    groups: int
    dtype: str
    out_dtype: str | None
    rank: int
    seed: int


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, strides, stretch, spread = each(1, 3), each(1, 3), each(1, 2), each(1, 2)
    pads = tuple(zip(each(-1, 3), each(-1, 3), strict=True))
    padding = draw(st.sampled_from(("SAME", "VALID", pads, pads, pads)))
    if isinstance(padding, str):
        stretch = (1,) * dims  # a padding by name is not defined for a dilated input
    least = [
        max(1, -(-((k - 1) * b + 1 - (sum(p) if padding == pads else 0) - 1) // a) + 1)
        for k, a, b, p in zip(kernel, stretch, spread, pads, strict=True)
    ]
    spatial = [n + draw(st.integers(0, 3)) for n in least]
    x_spec, w_spec, out_spec = (tuple(draw(st.permutations(range(dims + 2)))) for _ in range(3))

    def laid_out(sizes: list[int], spec: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sizes[spec.index(k)] for k in range(dims + 2))

    dtype = draw(st.sampled_from(DTYPES))
    return Conv(
        laid_out([draw(st.integers(1, 3)), groups * inner, *spatial], x_spec),
        laid_out([groups * outer, inner, *kernel], w_spec),
        strides,
        padding,
        stretch,
        spread,
        lax.ConvDimensionNumbers(x_spec, w_spec, out_spec),
        groups,
        dtype,
        draw(st.sampled_from((None, None, "float32", dtype))),
        draw(st.integers(1, min(inner * math.prod(kernel), groups * outer, 4))),
        draw(seeds()),
    )


def conv_law(case: Conv) -> None:
    def f(params: Any, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            params["w"],
            case.strides,
            case.padding,
            case.lhs_dilation,
            case.rhs_dilation,
            case.numbers,
            case.groups,
            preferred_element_type=case.out_dtype,
        )

    w, x = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in (case.w_shape, case.x_shape))
    targets = {"w": jlora.LoRA(rank=case.rank, alpha=3.0)}
    law(f, {"w": w}, targets, case.seed, x, bound=tolerance(case.dtype), factored=True)


@dataclasses.dataclass(frozen=True)
class Gather:
    """A lookup with any dimension numbers; with `inner`, a product that contracts these axes of the result follows."""

    shape: tuple[int, ...]
    indices: tuple[Any, ...]
    index_shape: tuple[int, ...]
    index_dtype: str
    numbers: lax.GatherDimensionNumbers
    slice_sizes: tuple[int, ...]
    mode: str
    fill: float | None
    inner: tuple[int, ...]
    dtype: str
    seed: int


@st.composite
def gathers(draw: st.DrawFn) -> Gather:
    kinds = ["whole", "whole", "part", "start", "row", "row", "batch"]
    axes = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    axes.insert(draw(st.integers(0, len(axes))), "whole")
    if axes.count("row") + axes.count("batch") == len(axes) - 1:  # one window alone is no matrix: rows make it one
        axes.insert(draw(st.integers(0, len(axes))), "row")
    mode = draw(st.sampled_from(["fill", "clip", "promise_in_bounds"]))
    slack = 0 if mode == "promise_in_bounds" else 2  # an index out of bounds breaks that promise
    dtype = draw(st.sampled_from(["int32", "int32", "int8", "uint8", "uint32"] if slack else ["int32"]))
    rows = (1, 2, 3, 5) if dtype == "int8" else (1, 2, 3, 5, 200)  # XLA itself errs where a size does not fit the dtype
    shape = tuple(draw(st.sampled_from(rows if kind == "row" else (1, 2, 3, 4, 5))) for kind in axes)
    sizes = tuple(
        n if kind == "whole" else 1 if kind in ("row", "batch") else draw(st.integers(1, n))
        for kind, n in zip(axes, shape, strict=True)
    )
    # Any axis with a window may be indexed too: a whole one (the index can only be clipped to 0, or out of bounds).
    indexed = [
        k
        for k, kind in enumerate(axes)
        if kind in ("row", "start") or (kind in ("whole", "part") and draw(st.integers(0, 4)) == 0)
    ]
    collapsed = tuple(k for k, kind in enumerate(axes) if kind == "row" and draw(st.integers(0, 5)) > 0)
    batching = draw(st.permutations([k for k, kind in enumerate(axes) if kind == "batch"]))
    batching = tuple(sorted(batching))
    start_map = tuple(draw(st.permutations(indexed)))
    loose = draw(st.lists(st.integers(1, 3), max_size=2))
    order = draw(st.permutations([*batching, *(-1 - j for j in range(len(loose)))]))
    index_batch = tuple(shape[k] if k >= 0 else loose[-1 - k] for k in order)
    windows = [k for k in range(len(axes)) if k not in collapsed and k not in batching]
    rank = len(index_batch) + len(windows)
    offsets = tuple(sorted(draw(st.permutations(range(rank)))[: len(windows)]))
    flat = [
        [draw(st.integers(-slack, shape[k] - sizes[k] + slack)) for k in start_map]
        for _ in range(math.prod(index_batch))
    ]
    numbers = lax.GatherDimensionNumbers(
        offsets, collapsed, start_map, batching, tuple(order.index(k) for k in batching)
    )
    # With several windows the rows are still a matrix, and a product contracts some of them.
    loose_dims = [k for k in range(rank) if k not in offsets]
    inner = {k for k in (*offsets[1:], *loose_dims) if draw(st.booleans())}
    inner |= {draw(st.sampled_from(offsets[1:]))} if len(offsets) > 1 else set()
    return Gather(
        shape,
        tuple(map(tuple, flat)),
        (*index_batch, len(start_map)),
        dtype,
        numbers,
        sizes,
        mode,
        draw(st.sampled_from([None, None, 0.0, 0.5])) if mode == "fill" else None,
        tuple(sorted(inner)),
        draw(st.sampled_from(DTYPES)),
        draw(seeds()),
    )


def gather_law(case: Gather) -> None:
    # In a narrow or unsigned dtype some indices wrap around, to another row or out of bounds.
    indices = jnp.asarray(np.asarray(case.indices, np.int64).astype(case.index_dtype).reshape(case.index_shape))

    def f(params: Any, indices: jax.Array, x: jax.Array) -> jax.Array:
        rows = lax.gather(params["w"], indices, case.numbers, case.slice_sizes, mode=case.mode, fill_value=case.fill)
        if not case.inner:
            return rows
        return lax.dot_general(x, rows, ((tuple(range(1, 1 + len(case.inner))), case.inner), ((), ())))

    w = jax.ShapeDtypeStruct(case.shape, case.dtype)
    rows = jax.eval_shape(lambda w: lax.gather(w, indices, case.numbers, case.slice_sizes), w)
    x = jax.ShapeDtypeStruct((2, *(rows.shape[k] for k in case.inner)), case.dtype)
    targets = {"w": jlora.LoRA(rank=1, alpha=3.0)}
    assume(not jlora.trace(f, {"w": w}, indices, x)["w"].unsupported_reason)
    law(f, {"w": w}, targets, case.seed, indices, x, bound=tolerance(case.dtype), factored=True)


def chain_law(case: Chain, *, factored: bool) -> None:
    """Where the chain may be formed, a product with the weight as it is comes first, and gives it its roles."""
    names = {role: tuple(k for k, r in enumerate(case.roles) if r == role) for role in ("in", "out", "stack")}
    plain = case.seed % len(case.shape)

    def f(params: Any, x: jax.Array, y: jax.Array) -> Any:
        first = None if factored else lax.dot_general(y, params["w"], (((0,), (plain,)), ((), ())))
        w = params["w"]
        for op in case.ops:
            w = apply(op, w, params)
        if case.conv:
            spec = (names["out"][0], *names["in"])
            numbers = lax.ConvDimensionNumbers(tuple(range(x.ndim)), spec, tuple(range(x.ndim)))
            return first, lax.conv_general_dilated(x, w, (1,) * (x.ndim - 2), "SAME", dimension_numbers=numbers)
        count = len(names["in"])
        inner, batch = tuple(range(count)), tuple(range(count, count + len(names["stack"])))
        if case.seed // 8 % 2:
            return first, lax.dot_general(w, x, ((names["in"], inner), (names["stack"], batch)))
        return first, lax.dot_general(x, w, ((inner, names["in"]), (batch, names["stack"])))

    used = tuple(case.end[k] for k in (*names["in"], *names["stack"]))
    shapes = {"w": case.shape, **case.others}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((2, *used) if case.conv else (*used, 2), jnp.float32)
    y = jax.ShapeDtypeStruct((case.shape[plain], 2), jnp.float32)
    sites = jlora.trace(f, params, x, y)
    targets = {"w": jlora.LoRA(rank=case.rank, alpha=3.0)}
    targets |= {name: jlora.LoRA(rank=1, alpha=3.0) for name in case.others if not sites[name].unsupported_reason}
    assume(not targets["w"].unsupported_reason(sites["w"]))
    bound = tolerance(*["bfloat16"] * case.low, jnp.float32)
    law(f, params, targets, case.seed, x, y, bound=bound, factored=factored)


@settings(FIXED)
@given(dots())
def test_dot_general(case: Dot) -> None:
    dot_law(case)


@settings(FIXED)
@given(convs())
def test_conv_general_dilated(case: Conv) -> None:
    conv_law(case)


@settings(FIXED)
@given(gathers())
def test_gather(case: Gather) -> None:
    gather_law(case)


def test_more_rows_than_the_dtype_of_an_index_counts() -> None:
    def f(params: Any, indices: jax.Array) -> jax.Array:
        numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
        return lax.gather(params["w"], indices, numbers, (1, 4), mode="fill")

    rng = np.random.default_rng(0)
    params, indices = {"w": random(rng, (300, 4), jnp.float32)}, jnp.array([[3], [255]], jnp.uint8)
    adapter = adapter_for(jlora.trace(f, params, indices), {"w": jlora.LoRA(rank=2)}, rng)
    expected = f(jlora.merge(params, adapter), indices)
    np.testing.assert_allclose(jlora.adapt(f)(params, adapter, indices), expected, rtol=2e-5, atol=2e-5)


@settings(CHAINS)
@given(factored_chains())
def test_structural_chains_stay_factored(case: Chain) -> None:
    chain_law(case, factored=True)


@settings(CHAINS)
@given(any_chains())
def test_any_chain(case: Chain) -> None:
    chain_law(case, factored=False)


@pytest.mark.nightly
@settings(FRESH)
@given(dots())
def test_dot_general_at_length(case: Dot) -> None:
    dot_law(case)


@pytest.mark.nightly
@settings(FRESH)
@given(convs())
def test_conv_general_dilated_at_length(case: Conv) -> None:
    conv_law(case)


@pytest.mark.nightly
@settings(FRESH)
@given(gathers())
def test_gather_at_length(case: Gather) -> None:
    gather_law(case)


@pytest.mark.nightly
@settings(FRESH)
@given(factored_chains())
def test_structural_chains_stay_factored_at_length(case: Chain) -> None:
    chain_law(case, factored=True)


@pytest.mark.nightly
@settings(FRESH)
@given(any_chains())
def test_any_chain_at_length(case: Chain) -> None:
    chain_law(case, factored=False)
