"""A factor in the axes of PEFT's files, and back."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.layouts import axis_groups, flat_names, layouts_of
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.torch.factor_layout import FlatAxes
from jlora.io.torch.weight_location import ModuleOwner

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the axes that are known before a file is read.

    Arguments:
        axes: by name.
        kernel: the sizes of the in axis: of a convolution the channels and every spatial axis, else one number.
    """

    axes: Mapping[str, int]
    kernel: tuple[int, ...]

    def with_axes(self, axes: Mapping[str, int]) -> "Sizes":
        """The same with some more axes."""
        return Sizes({**self.axes, **axes}, self.kernel)

    def of(self, name: str) -> list[int | None]:
        """The sizes of the axes that a name stands for in a file; None for one that is not known."""
        match name:
            case "1":
                return [1]
            case "1...":
                return [1 for _ in self.kernel[1:]]
            case "kernel":
                return [*self.kernel]
            case "window":
                return [*self.kernel[1:]]
            case _:
                return [self.axes.get(name)]


def sizes_of(owners: list[ModuleOwner]) -> Sizes:
    """The sizes that the weights of a module fix."""
    location = owners[0].location
    sizes = {"in": location.count("in"), "channels": location.kernel[0]}
    if location.num_joined == 1:
        sizes["out"] = sum(owner.location.count("out") for owner in owners)
    if location.num_experts is not None:
        sizes["experts"] = location.num_experts
    return Sizes(sizes, location.kernel)


def file_axes(axes: str, sizes: Sizes) -> list[list[int | None]]:
    """For every axis of a tensor the sizes that it joins; None for one that is not known."""
    joined: list[list[int | None]] = []
    for names in axis_groups(axes):
        if len(names) == 1:
            joined += [[size] for size in sizes.of(names[0])]
        else:
            joined.append([size for name in names for size in sizes.of(name)])
    return joined


def to_file(array: np.ndarray, names: FlatAxes, axes: str, kernel: tuple[int, ...]) -> np.ndarray:
    """A factor as the file has it.

    Arguments:
        array: the factor.
        names: of its axes.
        axes: of the file.
        kernel: as in `Sizes`.
    """
    sizes = Sizes(dict(zip(names, array.shape, strict=True)), kernel)
    shape = [math.prod(size or 1 for size in joined) for joined in file_axes(axes, sizes)]
    order = [names.index(name) for name in flat_names(axes)]
    return np.ascontiguousarray(array.transpose(order).reshape(shape))


def from_file(tensor: np.ndarray, names: FlatAxes, axes: str, sizes: Sizes, tensor_name: str) -> np.ndarray:
    """A factor from the file, with its axes in a given order.

    Arguments:
        tensor: as the file has it.
        names: of the factor's axes.
        axes: of the file.
        sizes: that are known.
        tensor_name: for the error.

    Raises:
        ValueError: if the shape is not the one that the sizes give.
    """
    _check_shape(tensor, axes, sizes, tensor_name)
    resolved = sizes.with_axes(_unknown_sizes(tensor, axes, sizes))
    order = flat_names(axes)
    flat_shape = [_flat_size(name, resolved) for name in order]
    return tensor.reshape(flat_shape).transpose([order.index(name) for name in names])


def _flat_size(name: str, sizes: Sizes) -> int:
    if name == "in":
        return math.prod(sizes.kernel)
    return math.prod(size or 1 for size in sizes.of(name))


def _unknown_sizes(tensor: np.ndarray, axes: str, sizes: Sizes) -> dict[str, int]:
    """The sizes that only the tensor's shape tells."""
    names_by_axis = [names for group in axis_groups(axes) for names in _one_name_an_axis(group, sizes)]
    unknown = {}
    for names, size in zip(names_by_axis, tensor.shape, strict=True):
        known = [n for name in names for n in sizes.of(name)] if len(names) > 1 else []
        for name in names:
            if sizes.of(name) == [None]:
                unknown[name] = size // math.prod(n for n in known if n is not None)
    return unknown


def _one_name_an_axis(group: list[str], sizes: Sizes) -> list[list[str]]:
    return [group] if len(group) > 1 else [group for _ in sizes.of(group[0])]


def _check_shape(tensor: np.ndarray, axes: str, sizes: Sizes, tensor_name: str) -> None:
    """Raises unless a tensor has the axes of a file; an axis with an unknown size may be any multiple of the others."""
    expected = file_axes(axes, sizes)
    known = [math.prod(size for size in joined if size is not None) for joined in expected]
    is_open = [None in joined for joined in expected]
    if len(expected) == tensor.ndim and all(
        size % product == 0 if unknown else size == product
        for size, product, unknown in zip(tensor.shape, known, is_open, strict=True)
    ):
        return
    shape = " x ".join("*".join("any" if size is None else str(size) for size in joined) for joined in expected)
    is_grouped = (
        "kernel" in axes.split()
        and len(expected) == tensor.ndim > 2
        and tensor.shape[1] != sizes.kernel[0]
        and tensor.shape[1] % sizes.kernel[0] == 0
    )
    grouped = " It spans all channels of a grouped convolution, so no update of the kernel equals it."
    raise ValueError(
        f"{tensor_name} has shape {tensor.shape}, and {shape} was expected.{grouped if is_grouped else ''}"
    )


def module_tensors(name: str, entry: ModuleEntry) -> Tensors:
    """A module's tensors by what PEFT calls them.

    Raises:
        ValueError: if PEFT has no such tensors.
    """
    location, factors = entry
    layouts = layouts_of(factors.method, location.module.kind, factors.axes, name)
    layout = next(layout for layout in layouts if set(layout) == set(factors.arrays))
    return {
        layout[factor].suffix: to_file(array, factors.axes[factor], layout[factor].axes, location.kernel)
        for factor, array in factors.arrays.items()
    }
