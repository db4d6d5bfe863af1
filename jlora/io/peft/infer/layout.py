"""The layout of a block: which permutation of axes, with which reshapes, makes a tensor's block the parameter's."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jlora.io.peft.infer.fingerprint import Domain, are_equal, cast
from jlora.io.peft.infer.pieces import to_leaf

_SAMPLES = 64


class Layout(NamedTuple):
    """`block.reshape(sizes).transpose(order).reshape(shape)`, as in `Piece`."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]


def joined_axes(layout: Layout, shape: tuple[int, ...], source: tuple[int, ...]) -> list[list[int]] | None:
    """For each axis of a tensor's block which axes of the parameter's block it joins, major first.

    Arguments:
        layout: from the tensor's block to the parameter's.
        shape: of the parameter's block.
        source: of the tensor's block.

    Returns:
        the axes; None if an axis of the parameter is spread over the tensor in another way than by whole axes.
    """
    sizes, order = layout
    ours, theirs = _owners([sizes[axis] for axis in order], shape), _owners(list(sizes), source)
    if ours is None or theirs is None:
        return None
    positions = {axis: position for position, axis in enumerate(order) if sizes[axis] != 1}
    joined: list[list[int]] = [[] for _ in source]
    previous = None
    for axis, owner in enumerate(theirs):
        if axis in positions:
            is_next = previous is not None and _follows(previous, positions[axis], order, sizes)
            if not (joined[owner] and joined[owner][-1] == ours[positions[axis]] and is_next):
                joined[owner].append(ours[positions[axis]])
            previous = positions[axis]
    flat = [axis for axes in joined for axis in axes]
    return joined if len(set(flat)) == len(flat) else None


def _follows(one: int, other: int, order: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Whether one position of an order comes after another, but for axes of size one."""
    return one < other and all(sizes[order[between]] == 1 for between in range(one + 1, other))


def _owners(fine: list[int], coarse: tuple[int, ...]) -> list[int] | None:
    """For each size of a finer shape the axis of the coarser shape that it is a factor of."""
    owners, axis, product = [], 0, 1
    for size in fine:
        while size != 1 and axis < len(coarse) and product == coarse[axis]:
            axis, product = axis + 1, 1
        if axis == len(coarse):
            return None if size != 1 else [*owners, *[max(axis - 1, 0)] * (len(fine) - len(owners))]
        owners.append(axis)
        product *= size
        if coarse[axis] % product:
            return None
    return owners


def plain_layouts(shape: tuple[int, ...], source: tuple[int, ...]) -> Iterator[Layout]:
    """Every permutation of the axes of the side that has more of them, if the other side joins adjacent ones.

    The reverse order comes first: torch holds (out, in) and JAX (in, out).

    Arguments:
        shape: of the parameter's block.
        source: of the tensor's block.
    """
    ours, theirs = (tuple(size for size in sizes if size != 1) for sizes in (shape, source))
    seen = set()
    for layout in _permutations(ours, theirs):
        seen.add(_meaning(layout))
        yield layout
    for order in _orders(len(theirs)):
        if _joins([theirs[axis] for axis in order], ours):
            layout = Layout(theirs, order)
            if _meaning(layout) not in seen:
                yield layout
    if not _joins(list(ours), theirs) and not _joins(list(theirs), ours):  # axes that straddle each other
        yield Layout((math.prod(source),), (0,))


def interleaved_layouts(shape: tuple[int, ...], source: tuple[int, ...]) -> Iterator[Layout]:
    """Plain layouts that regroup the rows of one axis, (a, b, c) to (a, c, b), as rotary embeddings may need it.

    Arguments:
        shape: of the parameter's block.
        source: of the tensor's block.
    """
    for axis, size in enumerate(shape):
        for outer in divisors(size):
            for middle in divisors(size // outer)[1:-1]:
                split = (*shape[:axis], outer, middle, size // (outer * middle), *shape[axis + 1 :])
                for layout in _permutations(split, tuple(size for size in source if size != 1)):
                    place = [layout.order[axis + position] for position in range(3)]  # in the tensor
                    if place[0] < place[2] < place[1]:
                        yield layout


def _permutations(fine: tuple[int, ...], coarse: tuple[int, ...]) -> Iterator[Layout]:
    """The permutations of a parameter's axes after which a tensor joins adjacent ones."""
    for order in _orders(len(fine)):
        if _joins([fine[axis] for axis in order], coarse):
            yield Layout(tuple(fine[axis] for axis in order), tuple(int(axis) for axis in np.argsort(order)))


def _orders(rank: int) -> Iterator[tuple[int, ...]]:
    """All permutations of some axes, the reverse first."""
    reverse = tuple(reversed(range(rank)))
    yield reverse
    yield from (order for order in itertools.permutations(range(rank)) if order != reverse)


def _joins(fine: list[int], coarse: tuple[int, ...]) -> bool:
    """Whether consecutive sizes multiply to the sizes of a coarser shape."""
    position = 0
    for size in coarse:
        product = 1
        while product < size and position < len(fine):
            product *= fine[position]
            position += 1
        if product != size:
            return False
    return position == len(fine)


def _meaning(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same for layouts that differ in axes of size one, or in how they spell adjacent axes that stay together."""
    merged: list[list[int]] = []
    for axis in (axis for axis in layout.order if layout.sizes[axis] != 1):
        last = merged[-1][-1] if merged else axis
        if last < axis and all(layout.sizes[between] == 1 for between in range(last + 1, axis)):
            merged[-1].append(axis)
        else:
            merged.append([axis])
    starts = sorted(group[0] for group in merged)
    joined = {group[0]: math.prod(layout.sizes[axis] for axis in group) for group in merged}
    return tuple(joined[start] for start in starts), tuple(starts.index(group[0]) for group in merged)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def equal_layouts(leaf: np.ndarray, source: np.ndarray, domain: Domain, layouts: Iterator[Layout]) -> list[Layout]:
    """The layouts under which two blocks are equal, element by element.

    Arguments:
        leaf: the parameter's block.
        source: the tensor's block.
        domain: the dtype to compare in.
        layouts: to be tried.
    """
    positions = np.random.default_rng(0).integers(0, leaf.size, _SAMPLES)
    expected = _values(leaf, positions, domain)
    survivors: dict[object, Layout] = {}
    for layout in layouts:
        sampled = _values(source, source_positions(layout, positions), domain)
        if _meaning(layout) in survivors or not np.array_equal(sampled, expected):
            continue
        if are_equal(leaf, to_leaf(source, *layout, leaf.shape), domain):
            survivors[_meaning(layout)] = layout
    return list(survivors.values())


def source_positions(layout: Layout, positions: np.ndarray) -> np.ndarray:
    """The flat positions in the tensor's block of elements at flat positions of the parameter's block."""
    sizes, order = layout
    coordinates = np.unravel_index(positions, [sizes[axis] for axis in order])
    by_axis = dict(zip(order, coordinates, strict=True))
    return np.ravel_multi_index([by_axis[axis] for axis in range(len(sizes))], sizes) if sizes else positions


def _values(array: np.ndarray, positions: np.ndarray, domain: Domain) -> np.ndarray:
    return cast(array[np.unravel_index(positions, array.shape)] if array.ndim else array.reshape(1)[positions], domain)
