"""The law over random dimension numbers, shapes, modes and dtypes of lookups."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

import jlora
from tests.support.agreement import adapter_for, random
from tests.support.random_chains import seeds
from tests.support.random_law import DTYPES, FIXED, FRESH, law, tolerance


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
    mode = draw(st.sampled_from(["fill", "clip", "promise_in_bounds"]))
    slack = 0 if mode == "promise_in_bounds" else 2  # an index out of bounds breaks that promise
    index_dtype = draw(st.sampled_from(["int32", "int32", "int8", "uint8", "uint32"] if slack else ["int32"]))
    kinds, shape, sizes = draw(tables(index_dtype))
    # Any axis with a window may be indexed too: a whole one (the index can only be clipped to 0, or out of bounds).
    indexed = [
        k
        for k, kind in enumerate(kinds)
        if kind in ("row", "start") or (kind in ("whole", "part") and draw(st.integers(0, 4)) == 0)
    ]
    collapsed = tuple(k for k, kind in enumerate(kinds) if kind == "row" and draw(st.integers(0, 5)) > 0)
    batching = tuple(k for k, kind in enumerate(kinds) if kind == "batch")
    start_map = tuple(draw(st.permutations(indexed)))
    loose = draw(st.lists(st.integers(1, 3), max_size=2))
    order = draw(st.permutations([*batching, *(-1 - j for j in range(len(loose)))]))
    index_batch = tuple(shape[k] if k >= 0 else loose[-1 - k] for k in order)
    n_windows = len(kinds) - len(collapsed) - len(batching)
    rank = len(index_batch) + n_windows
    offsets = tuple(sorted(draw(st.permutations(range(rank)))[:n_windows]))
    indices = tuple(
        tuple(draw(st.integers(-slack, shape[k] - sizes[k] + slack)) for k in start_map)
        for _ in range(math.prod(index_batch))
    )
    numbers = lax.GatherDimensionNumbers(
        offsets, collapsed, start_map, batching, tuple(order.index(k) for k in batching)
    )
    return Gather(
        shape,
        indices,
        (*index_batch, len(start_map)),
        index_dtype,
        numbers,
        sizes,
        mode,
        draw(st.sampled_from([None, None, 0.0, 0.5])) if mode == "fill" else None,
        draw(contracted(offsets, rank)),
        draw(st.sampled_from(DTYPES)),
        draw(seeds()),
    )


@st.composite
def tables(draw: st.DrawFn, index_dtype: str) -> tuple[list[str], tuple[int, ...], tuple[int, ...]]:
    """What a lookup does with each axis of its table, the table's shape, and the sizes of the slices."""
    kinds = draw(
        st.lists(st.sampled_from(["whole", "whole", "part", "start", "row", "row", "batch"]), min_size=1, max_size=3)
    )
    kinds.insert(draw(st.integers(0, len(kinds))), "whole")
    if kinds.count("row") + kinds.count("batch") == len(kinds) - 1:  # one window alone is no matrix: rows make it one
        kinds.insert(draw(st.integers(0, len(kinds))), "row")
    # XLA itself computes wrong rows if a size does not fit the dtype.
    rows = (1, 2, 3, 5) if index_dtype == "int8" else (1, 2, 3, 5, 200)
    shape = tuple(draw(st.sampled_from(rows if kind == "row" else (1, 2, 3, 4, 5))) for kind in kinds)
    sizes = tuple(
        n if kind == "whole" else 1 if kind in ("row", "batch") else draw(st.integers(1, n))
        for kind, n in zip(kinds, shape, strict=True)
    )
    return kinds, shape, sizes


@st.composite
def contracted(draw: st.DrawFn, offsets: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Axes of the result that a product contracts. With several windows the rows are a matrix: some are contracted."""
    loose = [k for k in range(rank) if k not in offsets]
    inner = {k for k in (*offsets[1:], *loose) if draw(st.booleans())}
    inner |= {draw(st.sampled_from(offsets[1:]))} if len(offsets) > 1 else set()
    return tuple(sorted(inner))


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


@settings(FIXED)
@given(gathers())
def test_gather(case: Gather) -> None:
    gather_law(case)


@pytest.mark.nightly
@settings(FRESH)
@given(gathers())
def test_gather_at_length(case: Gather) -> None:
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
