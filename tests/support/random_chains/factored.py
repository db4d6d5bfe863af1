"""Chains that must stay factored."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from tests.support.random_chains import steps
from tests.support.random_chains.chain import Axis, Chain, Op, seeds
from tests.support.random_chains.steps import Step


@st.composite
def factored_chains(draw: st.DrawFn) -> Chain:
    """Chains that must stay factored: only axes that are one index of the update are cut."""
    roles = draw(st.permutations(["in", "out", *draw(st.lists(st.sampled_from(["in", "out", "stack"]), max_size=2))]))
    axes = [Axis(draw(st.sampled_from([1, 2, 3, 4, 6])), role) for role in roles]
    shape = tuple(a.size for a in axes)
    low = draw(st.integers(0, 4)) == 0
    others: dict[str, tuple[int, ...]] = {}
    ops: list[Op] = []
    for _ in range(draw(st.integers(1, 7))):
        step = draw(st.sampled_from(_possible(axes, low)))
        op, axes = step(draw, axes, others)
        ops.append(op)
    end = tuple(a.size for a in axes)
    # A convolution wants each factor on one side, and no axis that was looked up: the update is stacked along it.
    across = any((op[0] in ("times", "over") and op[-1]) or op[0] == "take" for op in ops)
    is_kernel = 3 <= len(axes) <= 5 and sorted(a.role for a in axes) == [*["in"] * (len(axes) - 1), "out"]
    conv = is_kernel and not across and all(not a.parts and a.carried for a in axes) and draw(st.booleans())
    n_in = math.prod(n for n, r in zip(shape, roles, strict=True) if r == "in")
    n_out = math.prod(n for n, r in zip(shape, roles, strict=True) if r == "out")
    rank = draw(st.integers(1, min(n_in, n_out, 3)))
    return Chain(shape, others, tuple(ops), end, tuple(a.role for a in axes), rank, draw(seeds()), low, conv)


def _possible(axes: list[Axis], low: bool) -> list[Step]:
    """The steps that may follow; those that are listed twice are drawn more often."""
    always = [steps.transpose, steps.reverse, steps.negate, steps.expand, steps.barrier]
    return [*always, *_structural(axes), *([steps.to_bfloat16] if low else []), *_arithmetic(axes, low)]


def _structural(axes: list[Axis]) -> list[Step]:
    single = [a for a in axes if not a.parts]
    few = len(axes) < 7
    conditions: list[tuple[bool, list[Step]]] = [
        (few, [steps.broadcast]),
        (few and any(a.size in steps.DIVISIBLE for a in single), [steps.split_axis] * 2),
        (len(axes) > 1, [steps.join_axes] * 2),
        (len(single) < len(axes), [steps.take_apart] * 3),
        (any(a.size == 1 for a in axes), [steps.squeeze]),
        (any(a.size > 1 for a in single), [steps.strided_slice, steps.halve, steps.dynamic_slice]),
        (bool(single) and _is_small(axes), [steps.pad]),
        (any(a.carried for a in single), [steps.take]),
    ]
    return [step for permitted, options in conditions if permitted for step in options]


def _arithmetic(axes: list[Axis], low: bool) -> list[Step]:
    """Steps that are not defined for a vector, because its update has no rank."""
    if not steps.is_matrix(axes):
        return []
    single = [a for a in axes if not a.parts]
    joinable = len(single) == len(axes) and _is_small(axes)
    conditions: list[tuple[bool, list[Step]]] = [
        (True, [steps.scale]),
        (joinable, [steps.concat, steps.concat, steps.add, steps.mirror, steps.stop]),
        (joinable and not low, [steps.subtract]),  # in low precision no sum may cancel
        (bool(single) and sum(a.size > 1 for a in axes) > 1, [steps.times]),
    ]
    return [step for permitted, options in conditions if permitted for step in options]


def _is_small(axes: list[Axis]) -> bool:
    return math.prod(a.size for a in axes) < 2000
