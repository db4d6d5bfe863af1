"""The factors of one torch module: axes of the weight are joined into one in axis and one out axis."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from jlora.io.torch.weight_location import WeightLocation
from jlora.methods import VeRA
from jlora.methods._base import Method
from jlora.methods._common.factor_axes import WeightAxes

FlatAxes = tuple[str, ...]
# One entry for each axis of a flattened factor: its name, and the weight's axes that it joins; None for an axis of the
# method's own.
_Groups = list[tuple[str, tuple[int, ...] | None]]


def declared_axes(method: Method, location: WeightLocation) -> Mapping[str, str]:
    """The axes of every factor of a method for a weight, as tokens: `{"a": "*stack *in rank"}`."""
    return method.factors_for(WeightAxes.of(location.weight))


@dataclasses.dataclass(frozen=True)
class ModuleFactors:
    """The part of an update that belongs to one torch module.

    Arguments:
        method: the method.
        scale: a multiplier of the update, as in `Update`.
        arrays: the factors by name, flattened: one axis for each name in `axes`.
        axes: the names of each factor's axes: "experts", "in", "channels", "window", "out", and the method's own.
    """

    method: Method
    scale: float
    arrays: dict[str, np.ndarray]
    axes: dict[str, FlatAxes]

    def has_axis(self, axis: str) -> bool:
        """Whether some factor has an axis."""
        return any(axis in self.axes[name] for name in self.arrays)

    def size(self, axis: str) -> int | None:
        """The size of an axis; None if no factor has it."""
        sizes = (a.shape[self.axes[name].index(axis)] for name, a in self.arrays.items() if axis in self.axes[name])
        return next(sizes, None)

    @property
    def is_separable(self) -> bool:
        """Whether the factors for a part of the out axis are parts of these factors.

        LoKr has no out axis, and VeRA's random matrices for a part are not a part of those for the whole.
        """
        return (self.has_axis("out") or self.has_axis("channels")) and not isinstance(self.method, VeRA)


def flat_axes(method: Method, location: WeightLocation) -> dict[str, FlatAxes]:
    """The names of every factor's axes in a module."""
    return {
        name: tuple(axis for axis, _ in _groups(tokens, location) if axis != "loop")
        for name, tokens in declared_axes(method, location).items()
    }


def flatten(array: np.ndarray, tokens: str, location: WeightLocation) -> np.ndarray:
    """A factor of a weight in a module's layout: its stack axes that names enumerate, then one axis for each name.

    Arguments:
        array: the factor, as `tokens` declare its axes.
        tokens: `"*stack *in rank"`, for example.
        location: of the weight.
    """
    groups, entries = _groups(tokens, location), _entries(tokens, location)
    order = _order(groups)
    sizes = dict(zip(entries, array.shape, strict=True))
    array = array.transpose([entries.index(entry) for entry in order])
    return array.reshape([math.prod(sizes[entry] for entry in _members(group)) for group in groups])


def unflatten(array: np.ndarray, tokens: str, location: WeightLocation) -> np.ndarray:
    """The inverse of `flatten`."""
    groups, entries = _groups(tokens, location), _entries(tokens, location)
    order, shape = _order(groups), location.weight.shape
    own_sizes = {name: size for (name, _), size in zip(groups, array.shape, strict=True)}
    array = array.reshape([shape[entry] if isinstance(entry, int) else own_sizes[entry] for entry in order])
    return array.transpose([order.index(entry) for entry in entries])


def _groups(tokens: str, location: WeightLocation) -> _Groups:
    """The axes of a flattened factor."""
    stack = location.axes("stack")
    enumerated: _Groups = [("loop", (axis,)) for axis in stack[: location.loop_axes]]
    experts: _Groups = [("experts", location.expert_axes)] if location.expert_axes else []
    matrix: _Groups = [("in", location.ordered_in_axes)] if location.is_matrix else []
    meanings: dict[str, _Groups] = {
        "*stack": [*enumerated, *experts],
        "*in": [("in", location.ordered_in_axes)],
        "*channels": [("channels", location.channel_axes)],
        "*window": [("window", location.window_axes)],
        "*out": [("out", location.axes("out"))],
        "*weight": [*enumerated, *experts, *matrix, ("out", location.axes("out"))],
    }
    return [group for token in tokens.split() for group in meanings.get(token, [(token, None)])]


def _entries(tokens: str, location: WeightLocation) -> list[int | str]:
    """One entry for each axis of a factor: the weight's axis that it follows, or its own name."""
    meanings: dict[str, Iterable[int]] = {
        "*stack": location.axes("stack"),
        "*in": location.axes("in"),
        "*channels": location.channel_axes,
        "*window": location.window_axes,
        "*out": location.axes("out"),
        "*weight": range(len(location.weight.shape)),
    }
    return [entry for token in tokens.split() for entry in meanings.get(token, (token,))]


def _members(group: tuple[str, tuple[int, ...] | None]) -> tuple[int | str, ...]:
    name, axes = group
    return (name,) if axes is None else axes


def _order(groups: _Groups) -> list[int | str]:
    return [entry for group in groups for entry in _members(group)]
