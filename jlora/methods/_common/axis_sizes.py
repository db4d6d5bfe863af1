"""The sizes of the axes of a method's arrays."""

from collections.abc import Mapping

from jlora.methods._common import factor_axes
from jlora.methods._common.factor_axes import WeightAxes


class AxisSizes(dict[str, int]):
    """The sizes of the axes of a method; those that it does not compute are fields of the same name."""

    def __init__(self, method: object, sizes: Mapping[str, int]) -> None:
        super().__init__(sizes)
        self._method = method

    def __missing__(self, axis: str) -> int:
        size = getattr(self._method, axis, None)
        if not isinstance(size, int):
            name = type(self._method).__name__
            if axis.startswith("*"):
                groups = ", ".join(f"'{group}'" for group in factor_axes.GROUPS)
                raise ValueError(f"{name} declares the axes {axis!r}; the groups of a weight's axes are {groups}.")
            raise ValueError(
                f"{name} declares the axis {axis!r} without a size: add a field of that name, or override `sizes`."
            )
        return size


def stack_sizes(declared: str, axes: WeightAxes) -> tuple[int, ...]:
    """The sizes of the stack axes that the declared axes of an array begin with."""
    return next((axes.sizes(token) for token in declared.split() if token in factor_axes.STACKS), ())
