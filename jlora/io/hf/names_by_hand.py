"""The pieces of parameters under a map that was written by hand; layouts come from a comparison with the checkpoint."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.io.peft.infer.layout import Layout, plain_layouts
from jlora.io.peft.infer.pieces import Block, Piece, everything, to_source
from jlora.io.torch.module_names import Kind, Names, no_match_error
from jlora.io.torch.tensor_files import TensorFiles
from jlora.io.torch.weight_location import Owners, Weight, WeightLocation, locate_weights, owners_of

_OUT_AXIS: dict[Kind, int] = {"linear": 0, "conv1d": 1, "conv": 0, "embedding": 1, "parameter": 0}
_ADVICE = "Pass what jlora.peft.infer_names finds for the parameters of the base, in which layouts are exact."


def pieces_by_hand(
    names: Names, params: Mapping[str, Any], files: TensorFiles
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, str]]:
    """The pieces of every parameter by path, and the tensors that copy another one: output heads.

    Raises:
        ValueError: if a parameter has no entry, a tensor is missing, or a layout is not certain.
    """
    locations = locate_weights(names, {path: Weight(tuple(value.shape), ()) for path, value in params.items()})
    without = {path: names for path in params if path not in locations}
    if without:
        raise no_match_error("The map has no entry for these parameters:", without, names, params)
    owners = owners_of(locations)
    missing = {tensor: list(files.entries) for tensor in _tensors(locations) if tensor not in files.entries}
    if missing:
        raise no_match_error("The checkpoint has no tensors of these names:", missing, names, params)
    pieces = {path: _pieces(location, params[path], owners, params, files) for path, location in locations.items()}
    copies, claimed = {}, set(_tensors(locations))
    for location in locations.values():
        tied = f"{location.module.tied}.weight"
        if location.module.tied and tied in files.entries and tied not in claimed:
            copies[tied] = _tensor(location.first_modules[0], location.module.kind)
    return pieces, copies


def _tensors(locations: Mapping[str, WeightLocation]) -> list[str]:
    return [
        _tensor(name, location.module.kind)
        for location in locations.values()
        for modules in location.modules.values()
        for name in modules
    ]


def _tensor(module: str, kind: Kind) -> str:
    return module if kind == "parameter" else f"{module}.weight"


def _pieces(
    location: WeightLocation, value: Any, owners: Owners, params: Mapping[str, Any], files: TensorFiles
) -> tuple[Piece, ...]:
    pieces = []
    for index, modules in location.modules.items():
        tensors = [_tensor(name, location.module.kind) for name in modules]
        leaves = _joined_blocks(location, index, [files.shape(tensor) for tensor in tensors])
        for module, tensor, leaf in zip(modules, tensors, leaves, strict=True):
            source = _part(module, tensor, location, owners, params, files)
            block = np.asarray(leaf.of(value))
            layout = _layout(location.path, block, tensor, source.of(files.read(tensor)))
            pieces.append(Piece(tensor, leaf, source, layout.sizes, layout.order))
    return tuple(pieces)


def _joined_blocks(location: WeightLocation, index: tuple[int, ...], shapes: list[tuple[int, ...]]) -> list[Block]:
    """The block of the parameter for each of the modules that are joined along its last axes."""
    stack, inner = location.weight.shape[: location.loop_axes], location.weight.shape[location.loop_axes :]
    if len(shapes) == 1:
        return [Block((*stack, *inner), (*index, *map(range, inner)))]
    outs = [shape[_OUT_AXIS[location.module.kind]] for shape in shapes]
    starts = [sum(outs[:position]) for position in range(len(outs))]
    for axis in reversed(range(len(inner))):
        if np.prod(inner[axis:]) == sum(outs):
            view = (*stack, *inner[:axis], sum(outs))
            before = (*index, *map(range, inner[:axis]))
            return [Block(view, (*before, range(s, s + n))) for s, n in zip(starts, outs, strict=True)]
    raise ValueError(
        f"{location.path} {location.weight.shape} has no last axes for the {sum(outs)} outputs of its modules "
        f"{', '.join(location.first_modules)}. {_ADVICE}"
    )


def _part(
    module: str,
    tensor: str,
    location: WeightLocation,
    owners: Owners,
    params: Mapping[str, Any],
    files: TensorFiles,
) -> Block:
    """The block of a tensor that a weight holds: all of it, or one of several parts along its out axis."""
    shape, axis = files.shape(tensor), _OUT_AXIS[location.module.kind]
    if location.module.part is None:
        return everything(shape)
    parts = owners[module]
    counts = [params[part.location.path].size // len(part.location.modules) for part in parts]
    sizes = [count * shape[axis] // files.size(tensor) for count in counts]
    if sum(counts) != files.size(tensor) or sum(sizes) != shape[axis]:
        raise ValueError(
            f"{tensor} {shape} is divided among {', '.join(part.location.path for part in parts)}, which have "
            f"{sum(counts)} numbers in all. {_ADVICE}"
        )
    position = [part.location.path for part in parts].index(location.path)
    start = sum(sizes[:position])
    ranges = [range(size) for size in shape]
    ranges[axis] = range(start, start + sizes[position])
    return Block(shape, tuple(ranges))


def _layout(path: str, block: np.ndarray, tensor: str, source: np.ndarray) -> Layout:
    """The layout under which a merged parameter is nearest to the tensor of the base.

    Raises:
        ValueError: if no layout fits the shapes, two are as near, or the nearest is as far as an unrelated weight.
    """
    wide = source.astype(np.float32)
    distances: list[tuple[float, Layout]] = []
    for layout in plain_layouts(block.shape, source.shape) if block.size == source.size else ():
        values = to_source(block, *layout, source.shape).astype(np.float32)
        distances.append((float(np.linalg.norm(values - wide)), layout))
    if not distances:
        raise ValueError(f"{path} {block.shape} does not fit the tensor {tensor} {source.shape}. {_ADVICE}")
    distances.sort(key=lambda pair: pair[0])
    distance, layout = distances[0]
    is_far = source.ndim > 1 and distance >= float(np.linalg.norm(wide)) > 0
    if is_far or (len(distances) > 1 and distance and distance > 0.9 * distances[1][0]):
        raise ValueError(
            f"The layout of {path} {block.shape} in {tensor} {source.shape} is not certain: its values are too far "
            f"from those of the checkpoint. {_ADVICE}"
        )
    return layout
