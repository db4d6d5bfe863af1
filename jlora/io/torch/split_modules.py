"""From the update of a weight to the factors of each torch module that holds it."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.io.torch.factor_layout import ModuleFactors, declared_axes, flat_axes, flatten
from jlora.io.torch.join_modules import concatenate_out_axis
from jlora.io.torch.weight_location import Index, Weight, WeightLocation
from jlora.methods import GroupedLoRA, LoRA
from jlora.methods._base import Update

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
    if update.layers is not None:
        return _split_layers(update, update.layers, location)
    arrays, axes, num_joined = _flat_arrays(update, location), flat_axes(update.method, location), location.num_joined
    sizes = location.out_sizes if num_joined > 1 else ()
    by_index: ByIndex = {}
    for index in location.modules:
        at_index = {n: array if n in update.method.shared_arrays else array[index] for n, array in arrays.items()}
        factors = ModuleFactors(update.method, float(update.scale), at_index, axes)
        if isinstance(update.method, GroupedLoRA):
            by_index[index] = tuple(_split_groups(update.method, factors, location))
        else:
            by_index[index] = tuple(split_out_axis(factors, sizes, location.path)) if num_joined > 1 else (factors,)
    return by_index


def _split_layers(update: Update, layers: Sequence[int], location: WeightLocation) -> ByIndex:
    """The factors of the modules of some layers; modules of others are not adapted."""
    if not location.loop_axes:
        raise ValueError(
            f"{location.path}: the update is one of its layers {tuple(layers)} alone, and the module "
            f"{location.first_modules[0]} holds all. Convert it by jlora.to_lora, which has zeros for the others."
        )
    part = update.part
    numbers = {index: (layers.index(index[0]), *index[1:]) for index in location.modules if index[0] in layers}
    modules = {number: location.modules[index] for index, number in numbers.items()}
    weight = Weight(part.shape, location.weight.roles)
    by_index = split_modules(part, dataclasses.replace(location, weight=weight, modules=modules))
    absent = (None,) * location.num_joined
    return {index: by_index[numbers[index]] if index in numbers else absent for index in location.modules}


def _flat_arrays(update: Update, location: WeightLocation) -> dict[str, np.ndarray]:
    """The flattened factors, also those that are not trained; ranks that are masked out are zero."""
    arrays: Mapping[str, np.ndarray] = {**update.frozen, **update.factors}
    declared = declared_axes(update.method, location)
    flattened = {name: flatten(np.asarray(arrays[name]), axes, location) for name, axes in declared.items()}
    if update.rank_mask is not None:
        axes = flat_axes(update.method, location)
        last = [name for name in axes if "rank" in axes[name]][-1]
        mask = np.asarray(update.rank_mask).astype(flattened[last].dtype)
        following = len(axes[last]) - 1 - axes[last].index("rank")
        flattened[last] = flattened[last] * mask.reshape(-1, *[1] * following)
    return flattened


def _split_groups(
    method: GroupedLoRA, factors: ModuleFactors, location: WeightLocation
) -> Sequence[ModuleFactors | None]:
    """Each group as a LoRA of its own; all groups as one LoRA if one module holds the whole weight."""
    first = location.axes("out")[0]
    axis = method.axis(*location.weight)
    is_uneven = location.num_joined > 1 and len(set(location.out_sizes)) > 1
    if axis != first or location.num_joined not in (1, method.groups) or is_uneven:
        raise ValueError(
            f"{location.path} has {method.groups} groups along axis {axis}, and names give it {location.num_joined} "
            f"modules along its first out axis, {first}: name one module of equal size for each group."
        )
    lora = LoRA(method.rank, method.alpha, method.rank_stabilized, method.dropout, freeze_a=method.freeze_a)
    axes, a, b = flat_axes(lora, location), factors.arrays["a"], factors.arrays["b"]
    parts: list[ModuleFactors | None] = [None] * method.groups
    for position, group in enumerate(method.enabled):
        parts[group] = ModuleFactors(lora, factors.scale, {"a": a[:, position], "b": b[position]}, axes)
    if location.num_joined == 1:
        return [concatenate_out_axis(parts, [b.shape[-1]] * method.groups, location.path)]
    return parts


def split_out_axis(factors: ModuleFactors, sizes: Sequence[int], name: str) -> list[ModuleFactors]:
    """Factors in parts along their out axis; a factor without that axis belongs to every part.

    Arguments:
        factors: of a module or weight.
        sizes: of the parts.
        name: of the module or weight, for errors.

    Raises:
        ValueError: if the sizes do not add up to the out axis, or the factors cannot be divided.
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
