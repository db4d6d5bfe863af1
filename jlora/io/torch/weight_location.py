"""The location of a weight in torch: which modules hold it, and which of its axes they enumerate."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from jlora._interpreter.context import Role, matrix_side
from jlora.io.torch.module_names import Module, Names, absent_paths, compile_pattern, fill, index_names, modules_of

Index = tuple[int, ...]


class Weight(NamedTuple):
    """The shape of a weight and the roles of its axes; `roles` is empty if no product uses it."""

    shape: tuple[int, ...]
    roles: tuple[Role, ...]


@dataclasses.dataclass(frozen=True)
class WeightLocation:
    """A weight and the modules that hold it.

    Arguments:
        path: of the weight.
        weight: its shape and roles.
        module: its entry in the map, with the indices that the path specifies filled in; of several modules the first.
        loop_axes: the number of stack axes that the modules' names enumerate.
        modules: for every index of those axes, the names of the modules that are concatenated in the weight.
        sizes_joined: the sizes that the map gives those modules along the out axes; None if it gives none.
    """

    path: str
    weight: Weight
    module: Module
    loop_axes: int
    modules: dict[Index, tuple[str, ...]]
    sizes_joined: tuple[int, ...] | None = None

    @property
    def first_modules(self) -> tuple[str, ...]:
        """The modules at the first index."""
        return next(iter(self.modules.values()))

    @property
    def num_joined(self) -> int:
        """The number of modules that are concatenated along the weight's out axis."""
        return len(self.first_modules)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """The out sizes of the modules that are concatenated in the weight.

        Raises:
            ValueError: if they do not add up to that of the weight.
        """
        total, count = self.count("out"), self.num_joined
        sizes = self.sizes_joined or (total // count,) * count
        if sum(sizes) != total:
            raise ValueError(
                f"{self.path} has {total} outputs, and its modules {self.first_modules} have {sizes}: give each its "
                "size, Module(name, size=...)."
            )
        return sizes

    def axes(self, role: Role) -> tuple[int, ...]:
        """The axes with a role. Without roles, the axes that names enumerate are the stack, and all others are out."""
        shape, roles = self.weight
        if not roles:
            enumerated, others = range(self.loop_axes), range(self.loop_axes, len(shape))
            return tuple(enumerated if role == "stack" else others if role == "out" else ())
        return tuple(axis for axis, axis_role in enumerate(roles) if matrix_side(axis_role) == role)

    def sizes(self, role: Role) -> tuple[int, ...]:
        """The sizes of the axes with a role."""
        return tuple(self.weight.shape[axis] for axis in self.axes(role))

    def count(self, role: Role) -> int:
        """The product of the sizes of the axes with a role."""
        return math.prod(self.sizes(role))

    @property
    def expert_axes(self) -> tuple[int, ...]:
        """The stack axes that the module itself holds: the experts."""
        return self.axes("stack")[self.loop_axes :]

    @property
    def num_experts(self) -> int | None:
        """The number of experts that the module holds; None if it holds a plain weight."""
        return math.prod(self.weight.shape[axis] for axis in self.expert_axes) if self.expert_axes else None

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The in axes that are not spatial axes of a convolution."""
        return tuple(axis for axis in self.axes("in") if self.weight.roles[axis] == "in")

    @property
    def window_axes(self) -> tuple[int, ...]:
        """The spatial axes of a convolution."""
        return tuple(axis for axis in self.axes("in") if axis not in self.channel_axes)

    @property
    def ordered_in_axes(self) -> tuple[int, ...]:
        """The in axes in torch's order: the channels of a convolution precede its spatial axes."""
        return (*self.channel_axes, *self.window_axes) if self.module.kind == "conv" else self.axes("in")

    @property
    def kernel(self) -> tuple[int, ...]:
        """The in sizes of torch's weight: of a convolution the channels and every spatial axis, else one number."""
        if self.module.kind != "conv":
            return (self.count("in"),)
        shape = self.weight.shape
        channels = math.prod(shape[axis] for axis in self.channel_axes)
        return (channels, *(shape[axis] for axis in self.window_axes))

    @property
    def is_matrix(self) -> bool:
        """Whether the weight has in axes; a bias has none."""
        return bool(self.axes("in"))


def locate_weights(
    names: Names, weights: Mapping[str, Weight], *, assume_experts: bool = False
) -> dict[str, WeightLocation]:
    """Every weight that the map knows, in the order of the map.

    Arguments:
        names: the map.
        weights: by path.
        assume_experts: whether the first axis that does not enumerate layers is that of experts in a weight of kind
            "parameter" without a further stack axis: the program computes the experts in one dense product.

    Raises:
        ValueError: if a name lacks an index of its path, if the indices and the stack axes differ in number, or if two
            weights claim the same module.
    """
    locations: dict[str, WeightLocation] = {}
    absent = absent_paths(names, weights)
    for pattern, entry in names.items():
        modules, expression = modules_of(entry), compile_pattern(pattern)
        _check_indices(pattern, tuple(expression.groupindex), modules)
        for path, weight in weights.items():
            match = expression.fullmatch(path)
            if match and path not in locations and path not in absent:
                locations[path] = _locate(path, weight, modules, match.groupdict(), assume_experts)
    _check_claims(locations)
    return locations


def _check_indices(pattern: str, indices: tuple[str, ...], modules: tuple[Module, ...]) -> None:
    for module, index in itertools.product(modules, sorted(indices)):
        if index not in index_names(module.name):
            raise ValueError(
                f"{pattern!r} has the index {index!r}, and {module.name!r} does not. Use it in both, or in the name "
                "alone if the weight is stacked."
            )


def _check_claims(locations: Mapping[str, WeightLocation]) -> None:
    claims: dict[tuple[str, int | None], str] = {}
    for location in locations.values():
        for name in itertools.chain(*location.modules.values()):
            other = claims.setdefault((name, location.module.part), location.path)
            if other != location.path:
                raise ValueError(f"{other} and {location.path} both claim {name}: give each a part, or another name.")


def _with_experts(weight: Weight, num_layers: int) -> Weight:
    """The weight with its first axis after those of layers as a stack, if it is still a matrix then."""
    shape, roles = weight
    if roles[:num_layers] != ("stack",) * num_layers or "stack" in roles[num_layers:]:
        return weight
    new: tuple[Role, ...] = (*roles[:num_layers], "stack", *roles[num_layers + 1 :])
    return Weight(shape, new) if {"in", "out"} <= set(map(matrix_side, new)) else weight


def _locate(
    path: str, weight: Weight, modules: tuple[Module, ...], values: Mapping[str, str], assume_experts: bool
) -> WeightLocation:
    """The location of one weight, given the values of the indices in its path."""
    first = modules[0]
    enumerated = [index for index in index_names(first.name) if index not in values]
    if assume_experts and first.kind == "parameter":
        weight = _with_experts(weight, len(enumerated))
    location = WeightLocation(path, weight, first, min(len(enumerated), len(weight.shape)), {})
    _check_stack(location, enumerated)
    names = {}
    for index in itertools.product(*(range(n) for n in location.sizes("stack")[: len(enumerated)])):
        all_values = {**values, **dict(zip(enumerated, map(str, index), strict=True))}
        names[index] = tuple(fill(module.name, all_values) for module in modules)
    tied = None if first.tied is None else fill(first.tied, values)
    given = tuple(module.size for module in modules if module.size is not None)
    if given and len(given) < len(modules):
        raise ValueError(f"{path}: give a size to each of its modules, or to none.")
    module = dataclasses.replace(first, tied=tied)
    return dataclasses.replace(location, module=module, modules=names, sizes_joined=given or None)


def _check_stack(location: WeightLocation, enumerated: list[str]) -> None:
    """Raises unless the enumerated indices and the weight's stack axes agree in number."""
    path, (shape, roles), module = location.path, location.weight, location.module
    num_stack, may_hold_experts = len(location.axes("stack")), module.kind == "parameter" and bool(roles)
    if not len(enumerated) <= num_stack <= len(enumerated) + may_hold_experts:
        raise ValueError(
            f"{path} {shape} has {num_stack} stack axes, and {module.name!r} has the indices {enumerated} for them: "
            "give one index to each."
        )
    if may_hold_experts and location.is_matrix and num_stack == len(enumerated):
        raise ValueError(
            f"{path} {shape} has no axis of experts, and {module.name!r} is of kind 'parameter'. If one axis is that "
            "of experts, state it, jlora.trace(..., roles={path: ('stack', 'in', 'out')}), and initialise the adapter "
            "from these sites; else name the module that holds the weight, and its kind."
        )


class ModuleOwner(NamedTuple):
    """A weight that holds a module, or a part of it.

    Arguments:
        location: of the weight.
        stack_index: of the module along the weight's stack axes.
        position: of the module among those that are concatenated in the weight.
    """

    location: WeightLocation
    stack_index: Index
    position: int


Owners = dict[str, list[ModuleOwner]]


def owners_of(locations: Mapping[str, WeightLocation]) -> Owners:
    """The weights of every module by the module's name, its parts in order."""
    owners: Owners = collections.defaultdict(list)
    for location in locations.values():
        for index, names in location.modules.items():
            for position, name in enumerate(names):
                owners[name].append(ModuleOwner(location, index, position))
    return {name: sorted(parts, key=lambda part: part.location.module.part or 0) for name, parts in owners.items()}


def module_of(name: str, owners: Owners) -> str:
    """The module with a name, or that a parameter of this name belongs to."""
    return name.rpartition(".")[0] if owners[name][0].location.module.kind == "parameter" else name


def bias_of(location: WeightLocation, owners: Owners) -> str | None:
    """The path of the bias that belongs to a layer's weight; None if the map has none."""
    candidates = owners.get(f"{location.first_modules[0]}.bias", ())
    return next((c.location.path for c in candidates if c.location.module.part == location.module.part), None)
