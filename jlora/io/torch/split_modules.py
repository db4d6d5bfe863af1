"""From the update of a weight to the factors of each torch module that holds it."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.io.torch.factor_layout import ModuleFactors, declared_axes, flat_axes, flatten
from jlora.io.torch.join_modules import concatenate_out_axis
from jlora.io.torch.weight_location import Index, WeightLocation
from jlora.methods import GroupedLoRA, LoRA
from jlora.methods._base import Update
from jlora.methods._common.factor_axes import expand

ByIndex = dict[Index, tuple[ModuleFactors | None, ...]]


def split_modules(update: Update, location: WeightLocation) -> ByIndex:
    """The factors of every module that holds a weight.

    Arguments:
        update: of the weight.
        location: of the weight.

    Returns:
        for every index of the stack, the factors of the modules that are concatenated in the weight; None for one that
        is not adapted.

    Raises:
        ValueError: if the modules are not the groups of the update, or no factor can be cut between two modules.
    """
    method, arrays = update.method, _arrays(update, location)
    if isinstance(method, GroupedLoRA):
        return _split_groups(method, update.scale, arrays, location)
    declared, axes = declared_axes(method, location), flat_axes(method, location)
    flattened = {name: flatten(array, declared[name], location) for name, array in arrays.items()}
    num_joined = location.num_joined
    sizes = [location.count("out") // num_joined] * num_joined
    by_index: ByIndex = {}
    for index in location.modules:
        factors = ModuleFactors(method, update.scale, {name: array[index] for name, array in flattened.items()}, axes)
        by_index[index] = tuple(split_out_axis(factors, sizes, location.path)) if num_joined > 1 else (factors,)
    return by_index


def _arrays(update: Update, location: WeightLocation) -> dict[str, np.ndarray]:
    """The update's factors, also those that are not trained; ranks that are masked out are zero."""
    arrays = {name: np.asarray(array) for name, array in update.factors.items()}
    arrays |= {name: np.asarray(array) for name, array in update.frozen.items() if name in ("a", "b")}
    if update.rank_mask is not None:
        mask = np.asarray(update.rank_mask).astype(arrays["b"].dtype)
        rank_axis = expand(update.declared["b"], update.axes).index("rank")
        arrays["b"] = arrays["b"] * mask.reshape(-1, *[1] * (arrays["b"].ndim - rank_axis - 1))
    return arrays


def _split_groups(
    method: GroupedLoRA, scale: float, arrays: Mapping[str, np.ndarray], location: WeightLocation
) -> ByIndex:
    """Each group as a LoRA of its own; all groups as one LoRA if one module holds the whole weight."""
    first = location.axes("out")[0]
    axis = first if method.group_axis is None else method.group_axis % len(location.weight.shape)
    if axis != first or location.num_joined not in (1, method.groups):
        raise ValueError(
            f"{location.path} has {method.groups} groups along axis {axis}, and names give it {location.num_joined} "
            f"modules along its first out axis, {first}: name one module for each group."
        )
    enabled = method.enabled
    lora = LoRA(method.rank, method.alpha, method.rank_stabilized, method.dropout, freeze_a=method.freeze_a)
    axes, stack = flat_axes(lora, location), location.sizes("stack")
    a = arrays["a"].reshape(*stack, -1, len(enabled), method.rank)
    b = arrays["b"].reshape(*stack, len(enabled), method.rank, -1)
    width = b.shape[-1]
    by_index: ByIndex = {}
    for index in location.modules:
        parts: list[ModuleFactors | None] = [None] * method.groups
        for position, group in enumerate(enabled):
            pair = {"a": a[index][:, position], "b": b[index][position]}
            parts[group] = ModuleFactors(lora, scale, pair, axes)
        if location.num_joined == 1:
            parts = [concatenate_out_axis(parts, [width] * method.groups, location.path)]
        by_index[index] = tuple(parts)
    return by_index


def split_out_axis(factors: ModuleFactors, sizes: Sequence[int], name: str) -> list[ModuleFactors]:
    """Factors in parts along their out axis; a factor without that axis belongs to every part.

    Arguments:
        factors: of a module or weight.
        sizes: of the parts.
        name: of the module or weight, for errors.

    Raises:
        ValueError: if the sizes do not add up to the out axis, or the factors do not have one.
    """
    total = factors.size("out")
    if not factors.is_separable or total not in (None, sum(sizes)):
        raise ValueError(
            f"{name}: the {type(factors.method).__name__} cannot be divided into parts of out sizes {list(sizes)}; its "
            f"own out size is {total}. Adapt by LoRA, or convert it with jlora.to_lora."
        )
    borders = list(itertools.accumulate(sizes))[:-1]
    arrays: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for factor, array in factors.arrays.items():
        axes = factors.axes[factor]
        divided = np.split(array, borders, axes.index("out")) if "out" in axes else [array] * len(sizes)
        for part, piece in zip(arrays, divided, strict=True):
            part[factor] = piece
    return [dataclasses.replace(factors, arrays=part) for part in arrays]
