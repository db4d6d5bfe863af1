"""Chains of any operations, factored or not."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

from tests.support.random_chains import steps
from tests.support.random_chains.chain import Axis, Chain, Op, apply, seeds
from tests.support.random_chains.steps import Step


@st.composite
def any_chains(draw: st.DrawFn) -> Chain:
    """Chains of any operations that the shape permits, factored or not."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    now, ops = shape, []
    for _ in range(draw(st.integers(1, 6))):
        axes = [Axis(n, "in") for n in now]
        op, _ = draw(st.sampled_from(_possible(now)))(draw, axes, {})
        out = jax.eval_shape(lambda w, op=op: apply(op, w, {}), jax.ShapeDtypeStruct(now, jnp.float32))
        if out.size < 3000:
            ops.append(op)
            now = out.shape
    roles = tuple(draw(st.sampled_from(["in", "out", "stack"])) for _ in now)
    return Chain(shape, {}, tuple(ops), now, roles, 1, draw(seeds()))


def _possible(shape: tuple[int, ...]) -> list[Step]:
    possible: list[Step] = [
        steps.expand,
        steps.negate,
        steps.scale,
        _tanh,
        _square,
        steps.stop,
        _reshape,
        _reshape,
        _select,
        _shift,
    ]
    if shape:
        possible += [steps.transpose, steps.reverse, steps.pad, steps.take, _times_any, _cumsum]
    if any(n > 1 for n in shape):
        possible += [steps.strided_slice, steps.halve, steps.dynamic_slice]
    if 1 in shape:
        possible += [steps.squeeze]
    if len(shape) < 6:
        possible += [steps.broadcast]
    return possible


def _tanh(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("tanh",), axes


def _square(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("square",), axes


def _select(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("select", draw(seeds())), axes


def _shift(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("shift", draw(seeds())), axes


def _cumsum(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("cumsum", draw(st.integers(0, len(axes) - 1))), axes


def _times_any(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("times", tuple(draw(st.sampled_from([1, a.size])) for a in axes), draw(seeds()), True), axes


def _reshape(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    rest, sizes = math.prod(a.size for a in axes), []
    while rest > 1 and len(sizes) < 4:
        sizes.append(draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
        rest //= sizes[-1]
    return ("reshape", (*sizes, rest)), axes
