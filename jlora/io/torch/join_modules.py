"""From the factors of torch modules to the update of the weight that they make up."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jlora.io.torch.factor_layout import ModuleFactors, declared_axes, flat_axes, unflatten
from jlora.io.torch.weight_location import Index, Weight, WeightLocation
from jlora.methods import DoRA, GroupedLoRA, LoRA
from jlora.methods._base import Update

Parts = Sequence[ModuleFactors | None]


def join_modules(parts: Parts, location: WeightLocation) -> ModuleFactors:
    """The factors of a weight from those of the modules that are concatenated in it.

    Modules with the same A share it. LoRAs that are otherwise alike become a `GroupedLoRA`, and all others one LoRA
    with a block-diagonal B.

    Arguments:
        parts: the factors of each module; None for one without an adapter.
        location: of the weight.

    Raises:
        ValueError: if no method has such factors.
    """
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    widths = location.sizes_joined or (location.count("out") // location.num_joined,) * location.num_joined
    sizes = [width if part is None else part.size("out") or width for part, width in zip(parts, widths, strict=True)]
    if not _can_share_factors(parts) and _are_groups(parts, sizes, location):
        return _as_groups(parts, location)
    return concatenate_out_axis(parts, sizes, location.path)


def _are_groups(parts: Parts, sizes: Sequence[int], location: WeightLocation) -> bool:
    """Whether the parts are LoRAs of one rank, scale and width that divide the weight's first out axis."""
    present = [part for part in parts if part is not None]
    first = present[0]
    is_alike = all((part.method, part.scale) == (first.method, first.scale) for part in present)
    axis_size = location.sizes("out")[0]
    return type(first.method) is LoRA and is_alike and len(set(sizes)) == 1 and axis_size % len(parts) == 0


def _as_groups(parts: Parts, location: WeightLocation) -> ModuleFactors:
    """LoRAs that are alike as one `GroupedLoRA`."""
    present = [part for part in parts if part is not None]
    lora = present[0].method
    assert isinstance(lora, LoRA)
    enable = None if len(present) == len(parts) else tuple(part is not None for part in parts)
    method = GroupedLoRA(
        lora.rank,
        lora.alpha,
        lora.rank_stabilized,
        lora.dropout,
        groups=len(parts),
        enable=enable,
        group_axis=location.axes("out")[0],
    )
    a = np.stack([part.arrays["a"] for part in present], 1)
    b = np.stack([part.arrays["b"] for part in present])
    return ModuleFactors(method, present[0].scale, {"a": a, "b": b}, flat_axes(method, location))


def concatenate_out_axis(parts: Parts, sizes: Sequence[int], name: str) -> ModuleFactors:
    """Parts as one along the out axis.

    Factors without that axis are shared if they are equal. Otherwise several LoRAs become one with a block-diagonal B:

        [A_1 A_2],  [[B_1 0], [0 (s_2 / s_1) B_2]],  scale s_1

    Arguments:
        parts: the factors of each part; None for one without an adapter, where B is zero.
        sizes: the out sizes of the parts.
        name: of the module or weight, for errors.

    Raises:
        ValueError: if no method has such factors.
    """
    if _can_share_factors(parts):
        return _with_shared_factors([part for part in parts if part is not None])
    present = [part for part in parts if part is not None]
    classes = {type(part.method) for part in present}
    is_incomplete_dora = classes == {DoRA} and len(present) < len(parts)
    if classes not in ({LoRA}, {DoRA}) or is_incomplete_dora:
        raise ValueError(
            f"{name}: the modules that are concatenated in it have different factors of "
            f"{', '.join(sorted(c.__name__ for c in classes))}, and no single update has both. Adapt all of them "
            "by LoRA."
        )
    return _with_block_diagonal_b(parts, sizes)


def _can_share_factors(parts: Parts) -> bool:
    """Whether all parts have the same method and scale, and the same factors but for those with an out axis."""
    present = [part for part in parts if part is not None]
    first = present[0]
    if len(present) < len(parts) or not first.is_separable:
        return False
    return all(
        (part.method, part.scale) == (first.method, first.scale)
        and all("out" in first.axes[f] or np.array_equal(part.arrays[f], array) for f, array in first.arrays.items())
        for part in present
    )


def _with_shared_factors(parts: Sequence[ModuleFactors]) -> ModuleFactors:
    arrays, axes = dict(parts[0].arrays), parts[0].axes
    for factor in arrays:
        if "out" in axes[factor]:
            arrays[factor] = np.concatenate([part.arrays[factor] for part in parts], axes[factor].index("out"))
    return dataclasses.replace(parts[0], arrays=arrays)


def _with_block_diagonal_b(parts: Parts, sizes: Sequence[int]) -> ModuleFactors:
    present = [part for part in parts if part is not None]
    first = present[0]
    rank, scale, dtype = sum(_rank(part) for part in present), total_scale(first), first.arrays["b"].dtype
    experts = first.arrays["b"].shape[:-2]
    b, row, column = np.zeros((*experts, rank, sum(sizes)), dtype), 0, 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            stop = row + _rank(part)
            b[..., row:stop, column : column + size] = part.arrays["b"] * dtype.type(total_scale(part) / scale)
            row = stop
        column += size
    arrays = {"a": np.concatenate([part.arrays["a"] for part in present], -1), "b": b}
    if isinstance(first.method, DoRA):
        arrays["m"] = np.concatenate([part.arrays["m"] for part in present])
    dropout = max(part.method.dropout for part in present)
    method_class = DoRA if isinstance(first.method, DoRA) else LoRA
    return dataclasses.replace(
        first, method=method_class(rank, scale * rank, dropout=dropout), scale=1.0, arrays=arrays
    )


def _rank(factors: ModuleFactors) -> int:
    return factors.size("rank") or 0


def total_scale(factors: ModuleFactors) -> float:
    """The scale of a LoRA's product A B, that of the method times that of the update."""
    method = factors.method.direction if isinstance(factors.method, DoRA) else factors.method
    assert isinstance(method, LoRA)
    return method.scale * factors.scale


def stack_modules(
    by_index: Mapping[Index, ModuleFactors], location: WeightLocation, *, zeros_if_missing: bool = False
) -> Update:
    """The update of a weight from the factors at every index of its stack.

    LoRAs that differ in rank and scale become one of the largest rank, with zeros in A and in B for what a module
    lacks: no gradient reaches those, so they stay zero.

    Arguments:
        by_index: the factors.
        location: of the weight.
        zeros_if_missing: gives a module without factors zeros in all of them, if they are a product; otherwise the
            update is one of the other layers alone.

    Raises:
        ValueError: if a module has no factors, or differs otherwise in method or scale.
    """
    missing = [index for index in location.modules if index not in by_index]
    by_index = _with_equal_ranks(by_index)
    first = next(iter(by_index.values()))
    layers = tuple(sorted({index[0] for index in by_index if index}))
    if missing and zeros_if_missing and all(index[0] not in layers for index in missing) and not _is_product(first):
        return _of_some_layers(by_index, layers, location)
    if missing and not (zeros_if_missing and _is_product(first)):
        names = ", ".join(location.modules[index][0] for index in missing)
        raise ValueError(
            f"{location.path} holds all layers of its stack in one weight, and {names} has no adapter: a "
            f"{type(first.method).__name__} of the stack adapts them all. Adapt all layers, or unstack the weight."
        )
    for index, factors in by_index.items():
        if (factors.method, factors.scale) != (first.method, first.scale):
            raise ValueError(
                f"{location.path} holds all layers of its stack in one weight, which takes one method and scale: "
                f"{location.modules[index][0]} has {factors.method} and scale {factors.scale}, another one "
                f"{first.method} and scale {first.scale}."
            )
    shared = first.method.shared_arrays
    arrays = {n: a if n in shared else _stack(n, by_index, location) for n, a in first.arrays.items()}
    declared = declared_axes(first.method, location)
    factors = {name: unflatten(array, declared[name], location) for name, array in arrays.items()}
    return Update(factors, first.method, location.weight.roles, location.weight.shape, scale=first.scale)


def _of_some_layers(
    by_index: Mapping[Index, ModuleFactors], layers: tuple[int, ...], location: WeightLocation
) -> Update:
    """The update of some layers of the stack, which the others do not have."""
    shape = list(location.weight.shape)
    shape[location.axes("stack")[0]] = len(layers)
    renumbered = {(layers.index(index[0]), *index[1:]): factors for index, factors in by_index.items()}
    modules = {number: location.modules[layers[number[0]], *number[1:]] for number in renumbered}
    part = dataclasses.replace(location, weight=Weight(tuple(shape), location.weight.roles), modules=modules)
    update = stack_modules(renumbered, part)
    return dataclasses.replace(
        update, method=dataclasses.replace(update.method, layers=layers), shape=location.weight.shape
    )


def _is_product(factors: ModuleFactors) -> bool:
    """Whether zeros in all factors add nothing to the weight, and have no gradient."""
    method = factors.method
    return len(factors.arrays) > 1 and not method.depends_on_weight and not method.is_multiplicative


def _stack(name: str, by_index: Mapping[Index, ModuleFactors], location: WeightLocation) -> np.ndarray:
    """A factor at all indices of the stack; zeros for a module without this factor."""
    zeros = np.zeros_like(next(iter(by_index.values())).arrays[name])
    layers = [by_index[index].arrays[name] if index in by_index else zeros for index in location.modules]
    stacked = np.stack(layers)
    return stacked.reshape([*location.sizes("stack")[: location.loop_axes], *stacked.shape[1:]])


def _with_equal_ranks(by_index: Mapping[Index, ModuleFactors]) -> Mapping[Index, ModuleFactors]:
    """Plain LoRAs of several ranks or scales with the largest rank and one scale; all else unchanged."""
    if not _differ_in_rank_alone(list(by_index.values())):
        return by_index
    rank = max(_rank(factors) for factors in by_index.values())
    scales = [total_scale(factors) for factors in by_index.values()]
    scale = max(scales, key=abs) or 1.0
    if not all(_is_power_of_two(one / scale) for one in scales):  # bfloat16 would round the product
        by_index = {index: _with_float32_b(factors) for index, factors in by_index.items()}
    return {index: pad_rank(factors, rank, scale) for index, factors in by_index.items()}


def _differ_in_rank_alone(layers: Sequence[ModuleFactors]) -> bool:
    """Whether all are LoRAs that differ, but not in their dropout."""
    is_lora = all(isinstance(factors.method, LoRA) for factors in layers)
    differ = len({(factors.method, factors.scale) for factors in layers}) > 1
    return is_lora and differ and len({factors.method.dropout for factors in layers}) == 1


def times(array: np.ndarray, ratio: float) -> np.ndarray:
    """A factor times a number, in float32 or wider if a product in the factor's dtype may round."""
    dtype = array.dtype if _is_power_of_two(ratio) else np.promote_types(array.dtype, np.float32)
    return array.astype(dtype) * dtype.type(ratio)


def _is_power_of_two(ratio: float) -> bool:
    return abs(math.frexp(ratio)[0]) == 0.5


def _with_float32_b(factors: ModuleFactors) -> ModuleFactors:
    b = factors.arrays["b"]
    wide = b.astype(np.promote_types(b.dtype, np.float32))
    return dataclasses.replace(factors, arrays=factors.arrays | {"b": wide})


def pad_rank(factors: ModuleFactors, rank: int, scale: float) -> ModuleFactors:
    """A LoRA with zeros up to a rank, and with a given scale; B takes what the scale lacks.

        s A B  =  scale [A 0] [(s / scale) B; 0]

    Arguments:
        factors: of a plain LoRA.
        rank: at least that of the LoRA.
        scale: the new scale, alpha / rank.
    """
    assert isinstance(factors.method, LoRA)
    a, b = factors.arrays["a"], factors.arrays["b"]
    missing, ratio = rank - factors.method.rank, total_scale(factors) / scale
    a = np.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, missing)])
    b = np.pad(b * b.dtype.type(ratio), [*[(0, 0)] * (b.ndim - 2), (0, missing), (0, 0)])
    method = LoRA(rank, scale * rank, dropout=factors.method.dropout)
    return dataclasses.replace(factors, method=method, scale=1.0, arrays={"a": a, "b": b})
