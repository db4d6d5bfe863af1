"""How the axes of a weight are divided into indices, for methods that name blocks of an axis."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence

from jlora._ir.algebra import split_index
from jlora._ir.lazy import materialize
from jlora._ir.materialize import accumulation_dtype, dense
from jlora._ir.weight import AdaptedWeight, TensorNetwork


def split_group(w: AdaptedWeight, indices: str, minor: int) -> tuple[AdaptedWeight, str, str]:
    """Splits the joint axis of several indices into a major and a minor part, `(n / minor, minor)`.

    If an earlier adapter has divided the axis otherwise, what it adds becomes dense.

    Returns:
        the weight, with an index split if it belongs to both parts, and the indices of both parts.
    """
    if not splits_evenly([w.size(index) for index in indices], minor):
        w = with_undivided_axes(w, indices)
        indices = "".join(index for index in indices if index in w.labels)
    part, reach = "", 1
    while reach < minor:
        index = indices[-1]
        size = w.size(index)
        if reach * size <= minor:
            part, indices, reach = index + part, indices[:-1], reach * size
        else:
            before = {x.name for x in w.indices}
            w = split_index(w, index, (size * reach // minor, minor // reach))
            (new,) = (x.name for x in w.indices if x.name not in before)
            part, reach = new + part, minor
    return w, indices, part


def divides_alike(w: AdaptedWeight, updated: AdaptedWeight) -> bool:
    """Whether a weight with one more update still has its axes divided where it had before: see `split_group`."""

    def borders(f: AdaptedWeight, axis: str) -> set[int]:
        return set(itertools.accumulate((f.size(c) for c in reversed(axis)), operator.mul))

    pairs = zip(w.axes, updated.axes, strict=True)
    return all(borders(w, before) <= borders(updated, after) for before, after in pairs)


def with_undivided_axes(w: AdaptedWeight, indices: str) -> AdaptedWeight:
    """The weight with one index for each axis that has some indices: networks and maps become one dense network."""
    axes = tuple(axis[0] if axis[0] in indices else axis for axis in w.axes)
    sizes = {axis[0]: size for axis, size in zip(axes, w.shape, strict=True) if axis[0] in indices}
    joined = "".join(axes)
    kept = tuple(index._replace(size=sizes.get(index.name, index.size)) for index in w.indices if index.name in joined)
    dtype = accumulation_dtype(w.dtype)
    difference = dense(w, dtype) - materialize(w.base).astype(dtype)
    whole = dataclasses.replace(w, axes=axes, indices=kept, networks=(), maps=())
    network = TensorNetwork((difference.reshape([whole.size(index) for index in joined]),), (joined,))
    return dataclasses.replace(whole, networks=(network,))


def has_equal_parts(sizes: Sequence[int], parts: int) -> bool:
    """Whether `split_group` can split the joint axis of indices of these sizes into a number of equal parts."""
    size = math.prod(sizes)
    return size % parts == 0 and splits_evenly(sizes, size // parts)


def splits_evenly(sizes: Sequence[int], minor: int) -> bool:
    """Whether `split_group` can split the joint axis of indices of these sizes into blocks of `minor`."""
    reach = 1
    for size in reversed(sizes):
        if reach == minor:
            return True
        if minor % (reach * size) == 0:
            reach *= size
        else:
            return minor % reach == 0 and size % (minor // reach) == 0
    return reach == minor
