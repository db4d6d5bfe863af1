"""A factor in the axes of PEFT's files, and back."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.absent import absent_arrays
from jlora.io.peft.layouts import axis_groups, flat_names, layout_of
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
        """The sizes of the axes that a name stands for in a file; None if it is not known."""
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
    """The sizes that the weights of a module fix; several modules in one weight may differ in their out sizes."""
    location = owners[0].location
    sizes = {"in": location.count("in"), "channels": location.kernel[0]}
    if location.num_joined == 1:
        sizes["out"] = sum(owner.location.count("out") for owner in owners)
    if location.num_experts is not None:
        sizes["experts"] = location.num_experts
    return Sizes(sizes, location.kernel)


def _joint_size(sizes: list[int | None]) -> int | None:
    """The product of some sizes; None if one is not known."""
    factors = [size for size in sizes if size is not None]
    return math.prod(factors) if len(factors) == len(sizes) else None


def file_shape(axes: str, sizes: Sizes) -> list[int | None]:
    """The shape of a tensor in a file; None for a size that is not known."""
    shape: list[int | None] = []
    for names in axis_groups(axes):
        if len(names) == 1:
            shape += sizes.of(names[0])
        else:
            shape.append(_joint_size([size for name in names for size in sizes.of(name)]))
    return shape


def to_file(array: np.ndarray, names: FlatAxes, axes: str, kernel: tuple[int, ...]) -> np.ndarray:
    """A factor as the file has it.

    Arguments:
        array: the factor.
        names: of its axes.
        axes: of the file.
        kernel: as in `Sizes`.
    """
    shape = file_shape(axes, Sizes(dict(zip(names, array.shape, strict=True)), kernel))
    array = array.transpose([names.index(name) for name in flat_names(axes)])
    return np.ascontiguousarray(array.reshape([size or -1 for size in shape]))


def from_file(tensor: np.ndarray, names: FlatAxes, axes: str, sizes: Sizes, tensor_name: str) -> np.ndarray:
    """A factor from the file, with its axes in a given order.

    Arguments:
        tensor: as the file has it.
        names: of the factor's axes.
        axes: of the file.
        sizes: of all axes; the out size may be missing.
        tensor_name: for the error.

    Raises:
        ValueError: if the shape is not the one that the sizes give.
    """
    expected = file_shape(axes, sizes)
    is_equal = [size in (None, actual) for size, actual in zip(expected, tensor.shape, strict=False)]
    if len(expected) != tensor.ndim or not all(is_equal):
        shape = " x ".join("any" if size is None else str(size) for size in expected)
        hint = _grouped_convolution(tensor, axes, sizes) if len(expected) == tensor.ndim else ""
        raise ValueError(f"{tensor_name} has shape {tensor.shape}, and {shape} was expected.{hint}")
    order = flat_names(axes)
    flat_sizes = [_joint_size(sizes.of("kernel" if name == "in" else name)) for name in order]
    flattened = tensor.reshape([-1 if size is None else size for size in flat_sizes])
    return flattened.transpose([order.index(name) for name in names])


def _grouped_convolution(tensor: np.ndarray, axes: str, sizes: Sizes) -> str:
    """What to add to an error if a kernel has the channels of all groups of a convolution."""
    is_kernel = "kernel" in axes.split() and tensor.ndim > 2
    if is_kernel and tensor.shape[1] > sizes.kernel[0] and tensor.shape[1] % sizes.kernel[0] == 0:
        return " It spans all channels of a grouped convolution, so no update of the kernel equals it."
    return ""


def module_tensors(name: str, entry: ModuleEntry) -> Tensors:
    """A module's own tensors by what PEFT calls them.

    Arguments:
        name: of the module.
        entry: its factors.

    Raises:
        ValueError: if PEFT has no such tensors.
    """
    location, factors = entry
    own = {factor: axes for factor, axes in factors.axes.items() if factor not in absent_arrays(factors.method)}
    layout = layout_of(factors.method, location.module.kind, own, name)
    return {
        row.suffix: to_file(factors.arrays[factor], factors.axes[factor], row.axes, location.kernel)
        for factor, row in layout.items()
    }
