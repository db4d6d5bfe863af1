"""From the fingerprints of parameters and tensors to a tensor for every block of a parameter."""

import collections
from collections.abc import Iterator, Mapping

from jlora.io.peft.infer.constants import constant_parts, constant_sources
from jlora.io.peft.infer.decompose import Decomposer, Part, Source, slice_block
from jlora.io.peft.infer.fingerprint import Domain, Fingerprint, are_equal, domain_of, fingerprint
from jlora.io.peft.infer.neighbours import Neighbours, Unit
from jlora.io.peft.infer.place import place_blocks
from jlora.io.peft.infer.solution import Leaf, Solution
from jlora.io.peft.infer.table import TensorTable
from jlora.io.peft.infer.words import skeleton
from jlora.io.torch.module_names import fill, index_names

_MAX_FAILURES = 2  # leaves of one skeleton that are searched for thoroughly in vain


class Solver:
    """Finds the tensors of all parameters.

    Arguments:
        leaves: the parameters.
        table: of the checkpoint.
        told: for some paths the name of the tensor, with an index for each axis of a stack.
    """

    def __init__(self, leaves: Mapping[str, Leaf], table: TensorTable, told: Mapping[str, str]) -> None:
        self.leaves, self.table, self.told = leaves, table, told
        self.domains: dict[str, Domain] = {}
        self.parts: dict[str, list[Part]] = {}
        self.solution = Solution()
        self._narrow: dict[str, Domain] = {}
        self._failures: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()

    def solve(self) -> Solution:
        """Decomposes every parameter, decides between equal tensors, and compares all elements."""
        marks = dict(self._marks())
        for path, mark in marks.items():
            if mark.constant is None:
                self._decompose(path, mark)
        anchors, units = self._anchors()
        neighbours = Neighbours(anchors, self._candidates, self.told)
        remaining = neighbours.resolve(units)
        constant = {path: mark.constant for path, mark in marks.items() if mark.constant is not None}
        for path, value in constant.items():
            self.parts[path] = self._constant_parts(path, value, neighbours)
        units = [Unit(path, part, number) for path in constant for number, part in enumerate(self.parts[path])]
        remaining = neighbours.resolve([*remaining, *units])
        self.solution.constant_paths = set(constant)
        self._record(neighbours, remaining)
        place_blocks(neighbours.chosen, self.leaves, self.domains, self.table, self.solution)
        return self.solution

    def _marks(self) -> Iterator[tuple[str, Fingerprint]]:
        """The fingerprints of all parameters in their own dtypes; the domains that most of a dtype fit come first."""
        sizes: collections.Counter[tuple[Domain, bool]] = collections.Counter()
        for path, leaf in self.leaves.items():
            array = leaf.array()
            self.solution.shapes[path], dtype = array.shape, str(array.dtype)
            mark = fingerprint(array, dtype)
            if mark.constant is None:
                self._narrow[path] = domain_of(array)
                sizes[dtype, self._narrow[path] != dtype] += array.size
            self.domains[path] = dtype
            yield path, mark
        for path, domain in self._narrow.items():
            dtype = self.domains[path]
            if sizes[dtype, True] > sizes[dtype, False]:
                self.domains[path] = domain

    def _decompose(self, path: str, mark: Fingerprint) -> None:
        kind = (skeleton(path), self.solution.shapes[path])
        thorough = self._failures[kind] < _MAX_FAILURES
        array = self.leaves[path].array()
        for domain in dict.fromkeys((self.domains[path], self._narrow[path], str(array.dtype))):
            its_mark = mark if domain == str(array.dtype) else fingerprint(array, domain)
            parts = Decomposer(array, domain, self.table).parts(its_mark, thorough=thorough)
            if parts:
                self.domains[path], self.parts[path] = domain, parts
                return
        self._failures[kind] += 1
        self.solution.unmatched[path] = "no tensor, part, stack or join of tensors has its values"

    def _constant_parts(self, path: str, value: float, neighbours: Neighbours) -> list[Part]:
        shape = self.solution.shapes[path]
        if index_names(self.told.get(path, "")):
            return [Part(slice_block(shape, {0: i}), (), value) for i in range(shape[0])]
        return constant_parts(path, shape, value, neighbours, self.table)

    def _anchors(self) -> tuple[dict[Unit, Source], list[Unit]]:
        """The blocks with one possible tensor, and those with several or with constant values."""
        anchors, units = {}, []
        for path, parts in self.parts.items():
            for number, part in enumerate(parts):
                unit = Unit(path, part, number)
                sources = self._candidates(unit) if part.constant is None else []
                if part.is_padding:
                    continue
                if len(sources) == 1:
                    anchors[unit] = sources[0]
                else:
                    units.append(unit)
        return anchors, units

    def _candidates(self, unit: Unit) -> list[Source]:
        sources = unit.part.sources
        if unit.part.constant is not None:
            sources = constant_sources(unit, self.domains[unit.path], self.table)
        if unit.path not in self.told:
            return list(sources)
        template = self.told[unit.path]
        indices = dict(zip(index_names(template), map(str, unit.stack), strict=False))
        name = fill(template, indices) if len(indices) == len(index_names(template)) else template
        return [source for source in sources if source.tensor in (name, f"{name}.weight")]

    def _record(self, neighbours: Neighbours, remaining: Mapping[Unit, list[Source]]) -> None:
        for unit in neighbours.without_source:
            value = unit.part.constant
            if value is None:
                self.solution.unmatched[unit.path] = "its values are not those of the tensor in `known`"
            else:
                self.solution.without_source[unit.path] = value
        for unit, sources in remaining.items():
            names = self.solution.ambiguous.get(unit.path, ())
            self.solution.ambiguous[unit.path] = (*names, *(s.tensor for s in sources if s.tensor not in names))
        for unit, source in neighbours.chosen.items():
            copies = [
                other.tensor for other in unit.part.sources if self._is_copy(other, source, self.domains[unit.path])
            ]
            self.solution.copies |= dict.fromkeys(copies, source.tensor)

    def _is_copy(self, other: Source, source: Source, domain: Domain) -> bool:
        """Whether a candidate is another tensor with the same numbers in the same order."""
        if other.tensor == source.tensor or not (source.block.is_all and other.block.is_all):
            return False
        return are_equal(self.table.read(other.tensor).reshape(-1), self.table.read(source.tensor).reshape(-1), domain)
