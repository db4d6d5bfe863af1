"""A weight as the kernel of a convolution."""

import dataclasses
from collections.abc import Sequence

from jlora._ir.algebra import split_index
from jlora._ir.weight import AdaptedWeight, AxisMap


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight as the kernel of a convolution, with the indices of its channels.

    Arguments:
        f: the weight.
        spec: the axes of the output channels and of the input channels, then the spatial axes.
        group_count: the number of feature groups.
        group: the indices of the groups, the major ones of the output channels.
        outer: the other indices of the output channels.
        inner: the indices of the input channels of one group.
        spatial: the indices of the spatial axes.
    """

    f: AdaptedWeight
    spec: Sequence[int]
    group_count: int
    group: str
    outer: str
    inner: str
    spatial: str


def label_kernel(f: AdaptedWeight, spec: Sequence[int], group_count: int) -> Kernel | None:
    """Labels the channels; an index of the output channels is split if groups end within it. None if they cannot be."""
    out_axis, in_axis, *spatial_axes = spec
    group, remaining = "", group_count
    while remaining > 1:
        name = f.axes[out_axis][len(group)]
        size = f.index(name).size
        if size > remaining and size % remaining == 0:
            f, size = split_index(f, name, (remaining, size // remaining)), remaining
        if remaining % size:
            return None
        group, remaining = group + name, remaining // size
    spatial = "".join(f.axes[k] for k in spatial_axes)
    return Kernel(f, spec, group_count, group, f.axes[out_axis][len(group) :], f.axes[in_axis], spatial)


def channel_maps(kernel: Kernel) -> tuple[list[AxisMap], list[AxisMap]] | None:
    """The maps of the input's channels and those of the output's, None if one is neither."""
    maps, out, inner = kernel.f.maps, set(kernel.group + kernel.outer), set(kernel.group + kernel.inner)
    maps_of_one_group = [m for m in maps if not set(m.new) & set(kernel.group)]
    after = [m for m in maps_of_one_group if set(m.kept) <= out]
    before = [m for m in maps_of_one_group if set(m.kept) <= inner and set(m.kept) & set(kernel.inner)]
    return (before, after) if len(before) + len(after) == len(maps) else None
