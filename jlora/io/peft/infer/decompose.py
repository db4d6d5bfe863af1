"""Which tensors a parameter is made of, by fingerprints: one tensor, a stack, a join, a part, or several of these."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from jlora.io.peft.infer.fingerprint import Domain, Fingerprint, axis_sums, fingerprint
from jlora.io.peft.infer.layout import divisors
from jlora.io.peft.infer.pieces import Block, everything
from jlora.io.peft.infer.table import TensorTable

_MAX_SLICES = 1024  # the largest axis that may be a stack of things that are no whole tensors
_MAX_DEPTH = 2  # stack axes around a join or a part


@dataclasses.dataclass(frozen=True)
class Source:
    """A block of a tensor."""

    tensor: str
    block: Block


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of a parameter, and the tensors' blocks with the same fingerprint.

    Arguments:
        leaf: the block of the parameter.
        sources: the candidates; of a constant block none yet, since values cannot tell them apart.
        constant: the value if all elements are equal.
        is_padding: whether it is zeros after a join, which no tensor holds.
    """

    leaf: Block
    sources: tuple[Source, ...]
    constant: float | None = None
    is_padding: bool = False


Fixed = Mapping[int, int]  # the index of every axis that a block does not have any more


def slice_block(shape: tuple[int, ...], fixed: Fixed, axis: int = -1, fold: int = 1, window: range = range(0)) -> Block:
    """A block of an array: indices of some axes, and a window of another one.

    Arguments:
        shape: of the array.
        fixed: the indices.
        axis: of the window.
        fold: into how many equal runs the axis is divided; the window is taken of each.
        window: its start and stop.
    """
    view: list[int] = []
    index: list[int | range] = []
    for number, size in enumerate(shape):
        if number == axis and fold > 1:
            view += [fold, size // fold]
            index += [range(fold), window]
        else:
            view.append(size)
            index.append(fixed.get(number, window if number == axis else range(size)))
    return Block(tuple(view), tuple(index))


class Decomposer:
    """Finds what one parameter is made of.

    Arguments:
        leaf: the parameter.
        domain: the dtype in which it is compared.
        table: of the checkpoint.
    """

    def __init__(self, leaf: np.ndarray, domain: Domain, table: TensorTable) -> None:
        self.leaf, self.domain, self.table = leaf, domain, table

    def parts(self, mark: Fingerprint, *, thorough: bool = True) -> list[Part]:
        """The parts that make up the parameter; empty if tensors do not make it up.

        Arguments:
            mark: its fingerprint.
            thorough: whether to look for parts of tensors and inside of stacks too, which takes longer.
        """
        return self._split(self.leaf, {}, mark, thorough)

    def _split(self, block: np.ndarray, fixed: Fixed, mark: Fingerprint, thorough: bool) -> list[Part]:
        leaf = slice_block(self.leaf.shape, fixed)
        if mark.constant is not None:
            return [Part(leaf, (), mark.constant)]
        names = self.table.lookup(self.domain, mark.key)
        if names:
            return [self._part(leaf, names)]
        axes = [axis for axis in range(self.leaf.ndim) if axis not in fixed and self.leaf.shape[axis] > 1]
        rows: dict[int, np.ndarray] = {}
        for some in (axes[:1], axes[1:]):  # most stacks are along the first axis
            rows |= self._row_sums(block, some, fixed)
            parts = self._stack(block, fixed, {axis: rows[axis] for axis in some})
            if parts:
                return parts
        parts = self._join(block, fixed, rows)
        if parts or not thorough:
            return parts
        sources = tuple(self._windows(mark))
        if sources:
            return [Part(leaf, sources)]
        return self._slices(block, fixed, axes) if len(fixed) < _MAX_DEPTH and len(axes) > 1 else []

    def _row_sums(self, block: np.ndarray, axes: list[int], fixed: Fixed) -> dict[int, np.ndarray]:
        positions = [(axis - sum(other < axis for other in fixed),) for axis in axes]
        return dict(zip(axes, axis_sums(block, self.domain, positions), strict=True)) if axes else {}

    def _part(self, leaf: Block, names: tuple[str, ...]) -> Part:
        marks = self.table.fingerprints(self.domain)
        if marks[names[0]].constant is not None:
            return Part(leaf, (), marks[names[0]].constant)
        return Part(leaf, tuple(Source(name, everything(self.table.shape(name))) for name in names))

    def _stack(self, block: np.ndarray, fixed: Fixed, rows: Mapping[int, np.ndarray]) -> list[Part]:
        """Slices along one axis that are whole tensors."""
        for axis, sums in rows.items():
            size = block.size // len(sums)
            if not self.table.lookup(self.domain, (size, int(sums[0]))):
                continue
            names = [self.table.lookup(self.domain, (size, int(total))) for total in sums]
            if all(names):
                blocks = [slice_block(self.leaf.shape, {**fixed, axis: i}) for i in range(len(sums))]
                return [self._part(leaf, found) for leaf, found in zip(blocks, names, strict=True)]
        return []

    def _join(self, block: np.ndarray, fixed: Fixed, rows: Mapping[int, np.ndarray]) -> list[Part]:
        """Runs along one axis that are whole tensors; if the axis is folded, of every so many rows."""
        for axis, sums in rows.items():
            for fold in divisors(len(sums))[:-1]:
                unit = block.size // len(sums) * fold
                runs = self._runs(sums.reshape(fold, -1).sum(0, dtype=np.uint64), unit)
                if runs:
                    windows = [(slice_block(self.leaf.shape, fixed, axis, fold, run), names) for run, names in runs]
                    return [self._part(leaf, names) if names else Part(leaf, (), 0.0, True) for leaf, names in windows]
        return []

    def _runs(self, sums: np.ndarray, unit: int) -> list[tuple[range, tuple[str, ...]]]:
        """Consecutive runs with the fingerprints of tensors, up to zeros at the end that no tensor holds.

        Arguments:
            sums: of the rows.
            unit: the number of elements in a row.
        """
        prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sums, dtype=np.uint64)])
        lengths = [size // unit for size in self.table.sizes if size % unit == 0 and size // unit < len(sums)]
        padded = int(np.flatnonzero(np.append(True, sums)).max())  # the hash of zero is zero
        stack: list[list[tuple[range, tuple[str, ...]]]] = [[]]
        tried = set()
        while stack:
            runs = stack.pop()
            start = runs[-1][0].stop if runs else 0
            if start >= padded:
                rest = [(range(start, len(sums)), ())] if start < len(sums) else []
                return runs + rest
            for length in lengths:
                stop = start + length
                if stop <= len(sums) and stop not in tried:
                    total = (int(prefix[stop]) - int(prefix[start])) % 2**64
                    names = self.table.lookup(self.domain, (length * unit, total))
                    if names:
                        tried.add(stop)
                        stack.append([*runs, (range(start, stop), names)])
        return []

    def _windows(self, mark: Fingerprint) -> Iterator[Source]:
        """The runs of rows of larger tensors with a fingerprint; those of every so many rows if there are no others."""
        marks = self.table.fingerprints(self.domain)
        larger = [name for name in self.table.names if marks[name].constant is None and marks[name].size > mark.size]
        for only_plain in (True, False):
            hits = [source for name in larger for source in self._windows_in(name, mark, only_plain)]
            if hits:
                yield from hits
                return

    def _windows_in(self, name: str, mark: Fingerprint, only_plain: bool) -> Iterator[Source]:
        shape, size = self.table.shape(name), self.table.files.size(name)
        for axis, length in enumerate(shape):
            folds = [1] if only_plain else divisors(length)[1:-1]
            for fold in folds:
                unit = size // length * fold
                if mark.size % unit == 0 and mark.size // unit < length // fold:
                    sums = self.table.sums(self.domain, name, (axis,)).reshape(fold, -1).sum(0, dtype=np.uint64)
                    for window in _equal_windows(sums, mark.size // unit, mark.total):
                        yield Source(name, slice_block(shape, {}, axis, fold, window))
            if axis > 0 and only_plain and len(shape) > 2:
                unit = size // shape[0] // length
                if mark.size % unit == 0 and mark.size // unit < length:
                    for row, sums in enumerate(self.table.sums(self.domain, name, (0, axis))):
                        for window in _equal_windows(sums, mark.size // unit, mark.total):
                            yield Source(name, slice_block(shape, {0: row}, axis, 1, window))

    def _slices(self, block: np.ndarray, fixed: Fixed, axes: list[int]) -> list[Part]:
        """The parts of all slices along the axis that gives the fewest, if each slice has some."""
        first = {axis: self._slice(block, fixed, axis, 0) for axis in axes if self.leaf.shape[axis] <= _MAX_SLICES}
        counts = {axis: len(parts) * self.leaf.shape[axis] for axis, parts in first.items() if parts}
        for axis in sorted(counts, key=counts.__getitem__):
            parts = first[axis]
            for i in range(1, self.leaf.shape[axis]):
                following = self._slice(block, fixed, axis, i)
                if not following:
                    break
                parts = [*parts, *following]
            else:
                if any(part.constant is None for part in parts):
                    return parts
        return []

    def _slice(self, block: np.ndarray, fixed: Fixed, axis: int, index: int) -> list[Part]:
        """The parts of one slice."""
        inner = np.moveaxis(block, axis - sum(other < axis for other in fixed), 0)[index]
        return self._split(inner, {**fixed, axis: index}, fingerprint(inner, self.domain), True)


def _equal_windows(sums: np.ndarray, length: int, total: int) -> Iterator[range]:
    """The windows of some length over which the sums add up to a total."""
    prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sums, dtype=np.uint64)])
    for start in np.flatnonzero(prefix[length:] - prefix[:-length] == np.uint64(total)):
        yield range(int(start), int(start) + length)
