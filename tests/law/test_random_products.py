"""The law over random dimension numbers, shapes and dtypes of products and convolutions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jlora
from tests.support.random_chains import seeds
from tests.support.random_law import DTYPES, FIXED, FRESH, law, tolerance


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


@settings(FIXED)
@given(dots())
def test_dot_general(case: Dot) -> None:
    dot_law(case)


@pytest.mark.nightly
@settings(FRESH)
@given(dots())
def test_dot_general_at_length(case: Dot) -> None:
    dot_law(case)


@settings(FIXED)
@given(convs())
def test_conv_general_dilated(case: Conv) -> None:
    conv_law(case)


@pytest.mark.nightly
@settings(FRESH)
@given(convs())
def test_conv_general_dilated_at_length(case: Conv) -> None:
    conv_law(case)
