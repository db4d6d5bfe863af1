"""The factors of one torch module: axes of the weight are joined into one in axis and one out axis."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jlora.io.torch.weight_location import WeightLocation
from jlora.methods import VeRA
from jlora.methods._base import Method
from jlora.methods._common.factor_axes import WeightAxes, expand

FlatAxes = tuple[str, ...]
# The axes of a flattened factor: the name of each, and the axes of the factor that it joins: numbers of the weight's
# axes, or the name of an axis of the method's own.
_Groups = list[tuple[str, tuple[int | str, ...]]]


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

        LoKr has no out axis, and VeRA's random matrices for a part are not a part of those for all.
        """
        return (self.has_axis("out") or self.has_axis("channels")) and not isinstance(self.method, VeRA)


def declared_axes(method: Method, location: WeightLocation) -> Mapping[str, str]:
    """The axes of every factor that a method has for a weight, as it declares them: `{"a": "*stack *in rank"}`."""
    return method.factors_for(WeightAxes(*location.weight))


def flat_axes(method: Method, location: WeightLocation) -> dict[str, FlatAxes]:
    """The names of every factor's axes in a module."""
    return {
        name: tuple(axis for axis, _ in _groups(declared, location) if axis != "loop")
        for name, declared in declared_axes(method, location).items()
    }


def own_sizes(method: Method, location: WeightLocation) -> dict[str, int]:
    """The sizes of a method's own axes, such as the rank."""
    axes = WeightAxes(*location.weight)
    shapes = method.shapes(axes)
    return {
        entry: size
        for name, declared in method.factors_for(axes).items()
        for entry, size in zip(expand(declared, axes), shapes[name], strict=True)
        if isinstance(entry, str)
    }


def flatten(array: np.ndarray, declared: str, location: WeightLocation) -> np.ndarray:
    """A factor of a weight in a module's layout: the stack axes that names enumerate, then one axis for each name.

    Arguments:
        array: the factor.
        declared: its axes, `"*stack *in rank"`.
        location: of the weight.
    """
    groups, entries = _groups(declared, location), expand(declared, WeightAxes(*location.weight))
    sizes = dict(zip(entries, array.shape, strict=True))
    array = array.transpose([entries.index(entry) for _, joined in groups for entry in joined])
    return array.reshape([math.prod(sizes[entry] for entry in joined) for _, joined in groups])


def unflatten(array: np.ndarray, declared: str, location: WeightLocation) -> np.ndarray:
    """The inverse of `flatten`."""
    groups, entries = _groups(declared, location), expand(declared, WeightAxes(*location.weight))
    sizes: dict[int | str, int] = dict(enumerate(location.weight.shape))
    sizes |= {name: size for (name, joined), size in zip(groups, array.shape, strict=True) if joined == (name,)}
    order = [entry for _, joined in groups for entry in joined]
    return array.reshape([sizes[entry] for entry in order]).transpose([order.index(entry) for entry in entries])


def _groups(declared: str, location: WeightLocation) -> _Groups:
    """The axes of a flattened factor."""
    stack = location.axes("stack")
    enumerated: _Groups = [("loop", (axis,)) for axis in stack[: location.loop_axes]]
    experts: _Groups = [("experts", location.expert_axes)] if location.expert_axes else []
    inputs: _Groups = [("in", location.ordered_in_axes)]
    outputs: _Groups = [("out", location.axes("out"))]
    meanings: dict[str, _Groups] = {
        "*stack": [*enumerated, *experts],
        "*layers": enumerated if experts else enumerated[:-1],
        "*in": inputs,
        "*channels": [("channels", location.channel_axes)],
        "*window": [("window", location.window_axes)],
        "*out": outputs,
        "*weight": [*enumerated, *experts, *(inputs if location.is_matrix else []), *outputs],
    }
    return [group for token in declared.split() for group in meanings.get(token, [(token, (token,))])]
