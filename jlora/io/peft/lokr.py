"""LoKr in PEFT's files: PEFT has one factor for all modules, and its own rule for splitting a size by it."""

import dataclasses
from collections.abc import Mapping

from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.weight_location import WeightLocation
from jlora.methods import LoKr
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods.lokr import split_size

_AXES = (("in_major", "in_minor"), ("out_major", "out_minor"))


SCRAMBLED = (
    "PEFT 0.21.2 permutes the Kronecker product of a convolution along one axis if its second factor is a whole "
    "matrix, so no LoKr equals it: merge it with PEFT."
)


def is_scrambled(kernel: tuple[int, ...], has_matrix: bool) -> bool:
    """Whether PEFT permutes the Kronecker product of a module.

    For such a convolution it multiplies w1 (a, c) and w2 (b, d, window) as if w1 had the axes (1, a, c).

    Arguments:
        kernel: the in sizes of torch's weight: the channels and every spatial axis.
        has_matrix: whether the second factor is a whole matrix, and no product of low rank.
    """
    return len(kernel) == 2 and has_matrix


def with_usual_split(method: LoKr, location: WeightLocation) -> LoKr:
    """The LoKr with the rule of LyCORIS, jlora's default, if that splits a weight in the same way."""
    usual, axes = dataclasses.replace(method, split="lycoris"), WeightAxes(*location.weight)
    return usual if usual.sizes(axes) == method.sizes(axes) else method


def decompose_factor(entries: Mapping[str, ModuleEntry]) -> int:
    """The factor by which PEFT splits the sizes of all modules as their factors are split.

    Raises:
        ValueError: if no such factor exists.
    """
    splits = {name: _splits(entry.factors) for name, entry in entries.items()}
    methods = [entry.factors.method for entry in entries.values()]
    own = [method.factor for method in methods if isinstance(method, LoKr)]
    sizes = [size for pairs in splits.values() for pair in pairs for size in pair]
    wanted = {pair for pairs in splits.values() for pair in pairs}
    for factor in dict.fromkeys([*own, -1, *sizes]):
        if all(split_size(major * minor, factor, "peft") == (major, minor) for major, minor in wanted):
            return factor
    raise ValueError(
        f"PEFT splits the sizes of all modules by one decompose_factor, and none gives the splits {splits}. Save the "
        "modules as several adapters, or merge the adapter."
    )


def _splits(factors: ModuleFactors) -> list[tuple[int, int]]:
    """The in size and the out size as (major, minor)."""
    return [(factors.size(major) or 1, factors.size(minor) or 1) for major, minor in _AXES]
