"""Parameters whose elements are all equal, such as new norms and biases: what they may be made of."""

import math
from collections.abc import Sequence

from jlora.io.peft.infer.decompose import Part, Source, slice_block
from jlora.io.peft.infer.layout import plain_layouts
from jlora.io.peft.infer.neighbours import Name, Neighbours, Unit
from jlora.io.peft.infer.pieces import Block, everything
from jlora.io.peft.infer.table import TensorTable
from jlora.io.peft.infer.words import normalized


def constant_parts(
    path: str, shape: tuple[int, ...], value: float, neighbours: Neighbours, table: TensorTable
) -> list[Part]:
    """The parts of a constant parameter: those of its module's weight, or one for each layer of a stack, or one.

    Arguments:
        path: of the parameter.
        shape: of the parameter.
        value: of its elements.
        neighbours: what the other parameters are made of.
        table: of the checkpoint.
    """
    place = tuple(path.split("/"))
    siblings = [unit for unit in neighbours.below(place[:-1]) if unit.place[:-1] == place[:-1]]
    parts = [_beside(unit, neighbours.chosen[unit], place[-1], shape, value, table) for unit in siblings]
    sound = [part for part in parts if part is not None]
    if sound and len(sound) == len(parts) and _cover(sound, shape):
        return sound
    layers = _stack_size(place, shape, neighbours)
    if layers is None:
        return [Part(slice_block(shape, {}), (), value)]
    return [Part(slice_block(shape, {0: i}), (), value) for i in range(layers)]


def _beside(
    unit: Unit, source: Source, kind: str, shape: tuple[int, ...], value: float, table: TensorTable
) -> Part | None:
    """The part of a bias that belongs to a part of its weight."""
    module = source.tensor.rpartition(".")[0]
    tensor = f"{module}.{normalized(kind)[-1]}"
    if tensor == source.tensor or tensor not in table.names:
        return None
    view, index = unit.part.leaf.view, unit.part.leaf.index
    stack = [axis for axis, entry in enumerate(index) if isinstance(entry, int)]
    rest = [axis for axis in range(len(view)) if axis not in stack]
    size = math.prod(shape) // math.prod(view[axis] for axis in stack)
    trailing = _run(rest, view, size, from_end=True)
    theirs = list(range(len(source.block.view)))
    total = table.files.size(tensor)
    run = _run(theirs, source.block.view, total, from_end=False) or _run(theirs, source.block.view, total, True)
    if trailing is None or run is None:
        return None
    leaf = _sub_block(unit.part.leaf, [*stack, *trailing])
    candidate = Source(tensor, _sub_block(source.block, run))
    block = candidate.block.of(table.read(tensor))
    return Part(leaf, (candidate,), value) if bool((block == value).all()) else None


def _run(axes: Sequence[int], sizes: Sequence[int], total: int, from_end: bool) -> list[int] | None:
    """The first or the last of some axes, whose sizes multiply to a total."""
    ordered = list(reversed(axes)) if from_end else list(axes)
    for count in range(len(ordered) + 1):
        if math.prod(sizes[axis] for axis in ordered[:count]) == total:
            return sorted(ordered[:count])
    return None


def _sub_block(block: Block, axes: Sequence[int]) -> Block:
    return Block(tuple(block.view[axis] for axis in axes), tuple(block.index[axis] for axis in axes))


def _cover(parts: Sequence[Part], shape: tuple[int, ...]) -> bool:
    """Whether different blocks make up the parameter."""
    total = sum(math.prod(part.leaf.shape) for part in parts)
    return total == math.prod(shape) and len({part.leaf for part in parts}) == len(parts)


def _stack_size(place: Name, shape: tuple[int, ...], neighbours: Neighbours) -> int | None:
    """The number of layers, if what is known near a parameter is a stack of as many as its first axis has.

    One neighbour that is a stack suffices; another may be in one layer only, as the position biases of T5 are.
    """
    for end in range(len(place) - 1, 0, -1):
        near = neighbours.below(place[:end])
        if near:
            sizes = {unit.part.leaf.view[0] for unit in near if _is_stacked(unit)}
            return shape[0] if shape and sizes == {shape[0]} else None
    return None


def _is_stacked(unit: Unit) -> bool:
    return bool(unit.part.leaf.index) and isinstance(unit.part.leaf.index[0], int)


def constant_sources(unit: Unit, domain: str, table: TensorTable) -> list[Source]:
    """The whole tensors that a constant block may come from: those of its value and size, if a layout exists."""
    if unit.part.sources or unit.part.constant is None:
        return list(unit.part.sources)
    shape = unit.part.leaf.shape
    return [
        Source(name, everything(table.shape(name)))
        for name in table.constants(domain, math.prod(shape), unit.part.constant)
        if next(plain_layouts(shape, table.shape(name)), None) is not None
    ]
