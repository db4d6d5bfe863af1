"""The layout of every block whose tensor is decided; all elements are compared here."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jlora.io.peft.infer.decompose import Source
from jlora.io.peft.infer.fingerprint import Domain, cast
from jlora.io.peft.infer.layout import Layout, equal_layouts, interleaved_layouts, plain_layouts
from jlora.io.peft.infer.neighbours import Unit
from jlora.io.peft.infer.pieces import Piece
from jlora.io.peft.infer.solution import Leaf, Solution
from jlora.io.peft.infer.table import TensorTable
from jlora.io.peft.infer.words import skeleton


class _Placed(NamedTuple):
    """A block, its tensor, whether that is a vector, and the layouts under which the two are equal."""

    unit: Unit
    source: Source
    is_vector: bool
    layouts: list[Layout]

    def piece(self, layout: Layout) -> Piece:
        return Piece(self.source.tensor, self.unit.part.leaf, self.source.block, *layout)


def place_blocks(
    chosen: Mapping[Unit, Source],
    leaves: Mapping[str, Leaf],
    domains: Mapping[str, Domain],
    table: TensorTable,
    solution: Solution,
) -> None:
    """Adds the pieces of all parameters to a solution, or why a parameter has none.

    Arguments:
        chosen: the tensor of every block.
        leaves: the parameters.
        domains: the dtypes in which they are compared.
        table: of the checkpoint.
        solution: to be completed.
    """
    by_path = collections.defaultdict(list)
    for unit, source in chosen.items():
        by_path[unit.path].append((unit, source))
    layouts: dict[str, set[Layout]] = collections.defaultdict(set)
    undecided: dict[str, list[_Placed]] = {}
    for path in leaves:
        if path not in by_path or path in solution.open_paths:
            continue
        blocks = sorted(by_path[path], key=lambda entry: entry[0].number)
        placed = [_place(unit, source, leaves[path], domains[path], table) for unit, source in blocks]
        if not all(block.layouts for block in placed):
            solution.unmatched[path] = "its tensor has its numbers in an order that no reshape and transposition gives"
        elif all(len(block.layouts) == 1 for block in placed):
            layouts[skeleton(path)] |= {block.layouts[0] for block in placed}
            solution.pieces[path] = tuple(block.piece(block.layouts[0]) for block in placed)
        else:
            undecided[path] = placed
    for path, placed in undecided.items():
        _choose_layouts(path, placed, layouts[skeleton(path)], solution)


def _place(unit: Unit, source: Source, leaf: Leaf, domain: Domain, table: TensorTable) -> _Placed:
    is_vector = len(table.shape(source.tensor)) == 1
    ours, theirs = unit.part.leaf.of(leaf.array()), source.block.of(table.read(source.tensor))
    if unit.part.constant is not None:
        is_equal = bool((cast(theirs, domain) == unit.part.constant).all())
        return _Placed(unit, source, is_vector, list(plain_layouts(ours.shape, theirs.shape)) if is_equal else [])
    layouts = equal_layouts(ours, theirs, domain, plain_layouts(ours.shape, theirs.shape))
    layouts = layouts or equal_layouts(ours, theirs, domain, interleaved_layouts(ours.shape, theirs.shape))
    return _Placed(unit, source, is_vector, layouts)


def _choose_layouts(path: str, placed: Sequence[_Placed], known: set[Layout], solution: Solution) -> None:
    """Takes, of several layouts that give the same values, that of the same parameter in other layers."""
    pieces = []
    for block in placed:
        alike = [layout for layout in block.layouts if len(block.layouts) == 1 or layout in known]
        alike = alike or [layout for layout in block.layouts if block.is_vector and _is_in_order(layout)]
        if len(alike) != 1:
            tensor, count = block.source.tensor, len(block.layouts)
            solution.ambiguous[path] = (f"{tensor}, in {count} layouts that give the same values",)
            return
        pieces.append(block.piece(alike[0]))
    solution.pieces[path] = tuple(pieces)


def _is_in_order(layout: Layout) -> bool:
    return layout.order == tuple(range(len(layout.order)))
