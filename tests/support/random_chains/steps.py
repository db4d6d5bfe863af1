"""Steps that keep a weight factored: each draws an operation, and returns it with the axes after it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.support.random_chains.chain import Axis, Op, seeds

Step = Callable[[st.DrawFn, list[Axis], dict[str, tuple[int, ...]]], tuple[Op, list[Axis]]]


DIVISIBLE = (4, 6, 8, 9, 12)  # sizes of axes that are split


def is_matrix(axes: list[Axis]) -> bool:
    return sum(a.origin and a.size > 1 and not a.parts for a in axes) > 1


def transpose(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    order = draw(st.permutations(range(len(axes))))
    return ("transpose", tuple(order)), [axes[k] for k in order]


def reverse(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    which = draw(st.sets(st.integers(0, len(axes) - 1), min_size=1)) if axes else set()
    return ("rev", tuple(sorted(which))), axes


def negate(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("neg",), axes


def barrier(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("barrier",), axes


def to_bfloat16(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("cast", "bfloat16"), axes


def expand(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.integers(0, len(axes)))
    new = Axis(1, draw(st.sampled_from(["in", "out", "stack"])), origin=False, carried=False)
    return ("expand", (k,)), [*axes[:k], new, *axes[k:]]


def broadcast(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """A new axis, and perhaps axes of size one that grow."""
    k = draw(st.integers(0, len(axes)))
    new = Axis(draw(st.integers(1, 3)), draw(st.sampled_from(["in", "out", "stack"])), origin=False, carried=False)
    grown = [
        dataclasses.replace(a, size=draw(st.integers(1, 3)), origin=False, carried=False, parts=())
        if a.size == 1
        else a
        for a in axes
    ]
    out = [*grown[:k], new, *grown[k:]]
    return ("broadcast", tuple(a.size for a in out), tuple(j for j in range(len(out)) if j != k)), out


def _reshaped(axes: list[Axis]) -> tuple[Op, list[Axis]]:
    """After a reshape, axes of size one stand for no parameter's axis."""
    out = [dataclasses.replace(a, origin=False, carried=False) if a.size == 1 else a for a in axes]
    return ("reshape", tuple(a.size for a in axes)), out


def split_axis(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts and a.size in DIVISIBLE]))
    axis = axes[k]
    major = draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
    two = [dataclasses.replace(axis, size=major), dataclasses.replace(axis, size=axis.size // major)]
    return _reshaped([*axes[:k], *two, *axes[k + 1 :]])


def join_axes(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """Joins neighbours. Those of one kind are one index again; others are only taken apart where they were joined."""
    k = draw(st.integers(0, len(axes) - 2))
    a, b = axes[k], axes[k + 1]
    size = a.size * b.size
    if b.size == 1 or a.size == 1:
        joined = a if b.size == 1 else b
    elif a.kind == b.kind and not a.parts and not b.parts and a.carried:
        joined = dataclasses.replace(a, size=size)
    else:
        joined = Axis(size, a.role, parts=(*(a.parts or (a,)), *(b.parts or (b,))))
    return _reshaped([*axes[:k], joined, *axes[k + 2 :]])


def take_apart(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return _reshaped([part for a in axes for part in (a.parts or (a,))])


def squeeze(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    gone = draw(st.sets(st.sampled_from([k for k, a in enumerate(axes) if a.size == 1]), min_size=1))
    return ("squeeze", tuple(sorted(gone))), [a for k, a in enumerate(axes) if k not in gone]


def _cuttable(draw: st.DrawFn, axes: list[Axis]) -> int:
    return draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts and a.size > 1]))


def _resized(axes: list[Axis], k: int, size: int, **changes: Any) -> list[Axis]:
    return [*axes[:k], dataclasses.replace(axes[k], size=size, **changes), *axes[k + 1 :]]


def strided_slice(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = _cuttable(draw, axes)
    start = draw(st.integers(0, axes[k].size - 1))
    limit = draw(st.integers(start + 1, axes[k].size))
    stride = draw(st.integers(1, 3))
    starts = tuple(start if j == k else 0 for j in range(len(axes)))
    limits = tuple(limit if j == k else a.size for j, a in enumerate(axes))
    strides = tuple(stride if j == k else 1 for j in range(len(axes)))
    return ("slice", starts, limits, strides), _resized(axes, k, -(-(limit - start) // stride))


def halve(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = _cuttable(draw, axes)
    at, keep = draw(st.integers(1, axes[k].size - 1)), draw(st.integers(0, 1))
    return ("split", k, at, keep), _resized(axes, k, axes[k].size - at if keep else at)


def dynamic_slice(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = _cuttable(draw, axes)
    size = draw(st.integers(1, axes[k].size))
    return ("dynamic_slice", draw(st.integers(-2, axes[k].size + 2)), size, k), _resized(axes, k, size)


def pad(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts]))
    low, inner = draw(st.integers(-1 if axes[k].size > 1 else 0, 2)), draw(st.integers(0, 2))
    high = draw(st.integers(-1 if axes[k].size > 2 else 0, 2))
    size = axes[k].size + low + high + (axes[k].size - 1) * inner
    config = tuple((low, high, inner) if j == k else (0, 0, 0) for j in range(len(axes)))
    return ("pad", draw(st.sampled_from([0.0, 0.75])), config), _resized(axes, k, size, carried=True)


def take(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts and a.carried]))
    indices = draw(st.lists(st.integers(-axes[k].size, axes[k].size - 1), min_size=1, max_size=4))
    return ("take", tuple(indices), k), _resized(axes, k, len(indices), origin=False)


def scale(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return (draw(st.sampled_from(["scale", "unscale"])), draw(st.sampled_from([0.5, 1.7, -1.3]))), axes


def times(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """A vector along some axes; along all of them it would be a matrix."""
    long = [k for k, a in enumerate(axes) if a.size > 1]
    may = [k for k in long if not axes[k].parts]
    along = draw(st.sets(st.sampled_from(may), max_size=len(long) - 1)) if may else set()
    across = len({axes[k].role for k in along}) > 1  # then the vector is no factor of one side of the update
    shape = tuple(a.size if k in along else 1 for k, a in enumerate(axes))
    out = [dataclasses.replace(a, carried=True) if k in along else a for k, a in enumerate(axes)]
    return (draw(st.sampled_from(["times", "over"])), shape, draw(seeds()), across), out


def concat(draw: st.DrawFn, axes: list[Axis], others: dict[str, tuple[int, ...]]) -> tuple[Op, list[Axis]]:
    k, more = draw(st.integers(0, len(axes) - 1)), draw(st.integers(1, 2))
    shape = tuple(more if j == k else a.size for j, a in enumerate(axes))
    if draw(st.booleans()) and math.prod(shape) > max(shape):
        name: Any = f"v{len(others)}"
        others[name] = shape
    else:
        name = (shape, draw(seeds()))
    joined = [dataclasses.replace(a, carried=True) if a.size > 1 or j == k else a for j, a in enumerate(axes)]
    return ("concat", name, k, draw(st.booleans())), _resized(joined, k, axes[k].size + more)


def add(draw: st.DrawFn, axes: list[Axis], others: dict[str, tuple[int, ...]]) -> tuple[Op, list[Axis]]:
    name = f"v{len(others)}"
    others[name] = tuple(a.size for a in axes)
    return ("add", name), axes


def subtract(draw: st.DrawFn, axes: list[Axis], others: dict[str, tuple[int, ...]]) -> tuple[Op, list[Axis]]:
    (_, name), axes = add(draw, axes, others)
    return ("sub", name), axes


def mirror(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """The weight beside its own reverse: one parameter twice in one operand."""
    k = draw(st.integers(0, len(axes) - 1))
    joined = [dataclasses.replace(a, carried=True) if a.size > 1 or j == k else a for j, a in enumerate(axes)]
    return ("mirror", k), _resized(joined, k, 2 * axes[k].size)


def stop(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("stop",), axes
