"""From pieces to the entries of a map for `jlora.peft`: which torch modules hold a parameter, and their kinds."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from jlora._interpreter.context import Role, matrix_side
from jlora.io.peft.infer.layout import Layout, joined_axes
from jlora.io.peft.infer.patterns import ExactEntry
from jlora.io.peft.infer.pieces import Leaves, Piece
from jlora.io.peft.infer.templates import LETTERS, Template, fit, render, split_numbers, used_indices
from jlora.io.peft.infer.words import is_embedding, words
from jlora.io.torch.module_names import Kind, Module

_WEIGHT = ".weight"


class NoEntryError(ValueError):
    """A parameter whose pieces are known, and that no entry of a map describes; the message says why."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What entries need to know of a checkpoint.

    Arguments:
        shapes: of all tensors.
        leaves: the pieces of all parameters.
        leaf_shapes: of all parameters.
        heads: for the tensor of an embedding, that of the output head with the same values.
        tied: by path the module of the output head that shares an embedding and has no tensor.
        rename: gives a tensor's name in the adapter's files.
    """

    shapes: Mapping[str, tuple[int, ...]]
    leaves: Leaves
    leaf_shapes: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, str]
    tied: Mapping[str, str]
    rename: Callable[[str], str]

    def parts_of(self, tensor: str) -> list[Piece]:
        """The pieces that make up a tensor, in the order of their position along its fused axis."""
        pieces = {piece.source: piece for pieces in self.leaves.values() for piece in pieces if piece.tensor == tensor}
        return sorted(pieces.values(), key=lambda piece: [_start(entry) for entry in piece.source.index])


def exact_entry(path: str, pieces: Sequence[Piece], checkpoint: Checkpoint, roles: Sequence[Role] = ()) -> ExactEntry:
    """The entry of one parameter.

    Arguments:
        path: of the parameter.
        pieces: of the parameter.
        checkpoint: what its tensors are.
        roles: of the parameter's axes in the program; without them, the names decide what kind a module is.

    Raises:
        NoEntryError: if no entry of a map describes it.
    """
    _check_blocks(pieces, checkpoint.leaf_shapes[path], roles)
    by_index = _by_stack_index(pieces)
    kind = _kind(path, pieces[0], checkpoint, roles)
    if any(_kind(path, piece, checkpoint, roles) != kind for piece in pieces):
        raise NoEntryError("its tensors belong to modules of several kinds")
    columns = list(zip(*by_index.values(), strict=True))
    names = [{index: row[column] for index, row in by_index.items()} for column in range(len(columns))]
    templates = tuple(_template(column, kind, checkpoint) for column in names)
    modules = [_module(column, kind, checkpoint) for column in columns]
    sizes = [_out_size(column[0], checkpoint) for column in columns] if len(columns) > 1 else []
    if len(set(sizes)) > 1:
        modules = [dataclasses.replace(module, size=size) for module, size in zip(modules, sizes, strict=True)]
    tied = None
    heads = {index: checkpoint.heads.get(piece.tensor) for index, piece in names[0].items()}
    if kind == "embedding" and path in checkpoint.tied:
        tied = (checkpoint.tied[path],)
    elif kind == "embedding" and all(heads.values()):
        tied = fit({index: _module_name(str(head), checkpoint) for index, head in heads.items()})
    return ExactEntry(templates, tuple(modules), tied)


def _check_blocks(pieces: Sequence[Piece], shape: tuple[int, ...], roles: Sequence[Role]) -> None:
    """Raises unless the blocks of a parameter make it up, joined along its first out axis if along any."""
    if sum(math.prod(piece.leaf.shape) for piece in pieces) != math.prod(shape):
        raise NoEntryError("it is padded with rows that no tensor holds")
    stacks = _stack_axes(pieces)
    for piece in pieces:
        if piece.leaf.view != shape:
            raise NoEntryError("its tensors alternate in it, row by row or column by column")
        cut = [a for a, e in enumerate(piece.leaf.index) if a not in stacks and e != range(shape[a])]
        out = [a for a, role in enumerate(roles) if matrix_side(role) == "out" and shape[a] != 1]
        if len(cut) > 1 or (roles and cut and cut[0] != out[0]):
            raise NoEntryError("its tensors are joined along another axis than the first out axis")


def _by_stack_index(pieces: Sequence[Piece]) -> dict[tuple[int, ...], list[Piece]]:
    """The pieces at every index of the stack, in the order of their position."""
    by_index: dict[tuple[int, ...], list[Piece]] = collections.defaultdict(list)
    stacks = _stack_axes(pieces)
    for piece in pieces:
        by_index[tuple(entry for a in stacks for entry in [piece.leaf.index[a]] if isinstance(entry, int))].append(
            piece
        )
    rows = {index: sorted(row, key=lambda p: [_start(e) for e in p.leaf.index]) for index, row in by_index.items()}
    if len({len(row) for row in rows.values()}) > 1 or len({len(index) for index in rows}) > 1:
        raise NoEntryError("the layers of its stack do not consist of the same tensors")
    return dict(sorted(rows.items()))


def _stack_axes(pieces: Sequence[Piece]) -> list[int]:
    """The axes along which every index has a tensor of its own name but for a number."""
    first = pieces[0].leaf.index
    axes = [axis for axis, entry in enumerate(first) if isinstance(entry, int)]
    return [axis for axis in axes if _differ_in_numbers(pieces, axis)]


def _differ_in_numbers(pieces: Sequence[Piece], axis: int) -> bool:
    """Whether the tensors along an axis have one name but for their numbers: a stack, and no join."""
    rest = {}
    for piece in pieces:
        others = tuple(entry for number, entry in enumerate(piece.leaf.index) if number != axis)
        rest.setdefault(others, []).append(piece)
    return all(
        len({split_numbers(p.tensor)[0] for p in row}) == 1 and len({(p.tensor, p.source) for p in row}) == len(row)
        for row in rest.values()
    )


def _template(column: Mapping[tuple[int, ...], Piece], kind: Kind, checkpoint: Checkpoint) -> Template:
    names = {index: checkpoint.rename(piece.tensor) for index, piece in column.items()}
    if kind != "parameter":
        names = {index: name.removesuffix(_WEIGHT) for index, name in names.items()}
    template = fit(names)
    if template is None:
        raise NoEntryError(f"the numbers in the names of its layers, {list(names.values())[:3]}, follow no rule")
    indices = used_indices(template)
    if indices != sorted(indices) or len(indices) != len(next(iter(names))):
        raise NoEntryError(f"the indices in {render(template, LETTERS)} are in another order than the stacked axes")
    return template


def _module_name(tensor: str, checkpoint: Checkpoint) -> str:
    return checkpoint.rename(tensor).removesuffix(_WEIGHT)


def _module(column: Sequence[Piece], kind: Kind, checkpoint: Checkpoint) -> Module:
    """The kind of a module, and the part of it that the parameter is."""
    numbers = {_part_number(piece, checkpoint) for piece in column}
    sizes = {piece.leaf.shape for piece in column}
    if len(numbers) > 1 or len(sizes) > 1:
        raise NoEntryError("the layers of its stack are different parts of their tensors")
    return Module("", kind, numbers.pop())


def _part_number(piece: Piece, checkpoint: Checkpoint) -> int | None:
    """Which part of its tensor a piece is; None if it is all of it."""
    if piece.source.is_all:
        return None
    shape = checkpoint.shapes[piece.tensor]
    partial = [axis for axis, entry in enumerate(piece.source.index) if entry != range(piece.source.view[axis])]
    if piece.source.view != shape or len(partial) != 1 or isinstance(piece.source.index[partial[0]], int):
        raise NoEntryError(f"it is no run of rows of {piece.tensor}, but rows in turns or one slice of many")
    siblings = [other.source for other in checkpoint.parts_of(piece.tensor)]
    stops = [_stop(block.index[partial[0]]) for block in siblings if block.view == shape]
    starts = [_start(block.index[partial[0]]) for block in siblings if block.view == shape]
    if starts != [0, *stops[:-1]] or stops[-1] != shape[partial[0]]:
        raise NoEntryError(f"not all parts of {piece.tensor} are parameters")
    return siblings.index(piece.source)


def _start(entry: int | range) -> int:
    return entry if isinstance(entry, int) else entry.start


def _stop(entry: int | range) -> int:
    return entry + 1 if isinstance(entry, int) else entry.stop


def _out_size(piece: Piece, checkpoint: Checkpoint) -> int:
    shape, kind = checkpoint.shapes[piece.tensor], len(checkpoint.shapes[piece.tensor])
    joined = joined_axes(Layout(piece.sizes, piece.order), piece.leaf.shape, piece.source.shape)
    assert joined is not None
    return shape[0] if kind == 1 or (joined[0] and max(joined[0]) == len(piece.leaf.shape) - 1) else shape[-1]


def _kind(path: str, piece: Piece, checkpoint: Checkpoint, roles: Sequence[Role]) -> Kind:
    """The kind of the module that holds a piece."""
    shape, name = checkpoint.shapes[piece.tensor], piece.tensor
    if not name.endswith(_WEIGHT) or len(shape) < 2:
        return "parameter"
    if len(shape) > 2:
        return "conv"
    joined = joined_axes(Layout(piece.sizes, piece.order), piece.leaf.shape, piece.source.shape)
    if joined is None:
        raise NoEntryError(f"its axes are spread over those of {name}")
    has_bias = f"{name.removesuffix(_WEIGHT)}.bias" in checkpoint.shapes
    in_first: Kind = "conv1d" if has_bias else "embedding"
    if roles:
        return "linear" if _first_is_out(piece, joined, roles) else in_first
    if words(path)[-1] in ("embedding", "embeddings"):
        return "embedding"
    if not joined[0] or (joined[1] and joined[0][-1] > joined[1][-1]):  # the program has (in, out), torch (out, in)
        return "linear"
    if words(path)[-1] == "kernel" and has_bias:
        return "conv1d"
    return "embedding" if is_embedding(name) and not has_bias else "linear"


def _first_is_out(piece: Piece, joined: Sequence[Sequence[int]], roles: Sequence[Role]) -> bool:
    """Whether torch's first axis is that of the outputs.

    Raises:
        NoEntryError: if neither axis is, or if the program's axes are in another order than torch's.
    """
    axes = [axis for axis, entry in enumerate(piece.leaf.index) if isinstance(entry, range)]
    sides = [matrix_side(roles[axis]) for axis in axes]
    wanted = {side: [axis for axis, of in enumerate(sides) if of == side] for side in ("in", "out")}
    used = {side: [a for a in wanted[side] if piece.leaf.shape[a] != 1] for side in wanted}
    for order, first in ((("out", "in"), True), (("in", "out"), False)):
        if [list(axes) for axes in joined] == [used[side] for side in order]:
            return first
    raise NoEntryError(
        f"its axes, {tuple(roles)}, are in another order than those of {piece.tensor}, so the rows of PEFT's factors "
        "would be permuted"
    )
