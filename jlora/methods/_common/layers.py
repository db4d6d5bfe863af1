"""`layers=` of a method: which layers of a stacked weight it updates."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.methods._common.factor_axes import HasAxes

Layers = slice | Sequence[int] | None


def checked_layers(name: str, layers: Any) -> slice | tuple[int, ...] | None:
    """The layers as a slice, a tuple of numbers, or None for all.

    Arguments:
        name: of the method, for errors.
        layers: as the user gives them.

    Raises:
        ValueError: if they are something else.
    """
    if layers is None:
        return None
    parts = [layers.start, layers.stop, layers.step] if isinstance(layers, slice) else layers
    is_sequence = isinstance(parts, Sequence) and not isinstance(parts, str)
    numbers_of = [part for part in parts if part is not None] if is_sequence else []
    if not is_sequence or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in numbers_of):
        raise ValueError(f"{name}'s layers are a slice, a tuple of their numbers, or None for all, not {layers!r}.")
    return layers if isinstance(layers, slice) else tuple(int(n) for n in numbers_of)


def numbers_of_layers(layers: Layers, path: str, weight: HasAxes) -> tuple[int, ...] | None:
    """The numbers of the layers of a weight, in rising order; None if they are all.

    Arguments:
        layers: of a method.
        path: of the weight, for errors.
        weight: its shape and roles.

    Raises:
        ValueError: if the weight has no stack axis, or a layer does not exist, is given twice, or there is none.
    """
    if layers is None:
        return None
    if "stack" not in weight.roles:
        raise ValueError(
            f"{path} {tuple(weight.shape)} has no stack axis, so it has no layers {_text(layers)} to choose from: its "
            f"axes are {tuple(weight.roles)}. Layers that are parameters of their own are chosen by their paths."
        )
    size = weight.shape[layer_axis(weight)]
    if isinstance(layers, slice):
        outside = [n for n in (layers.start, layers.stop) if n is not None and not -size <= n <= size]
        chosen = [] if layers.step == 0 else list(range(*layers.indices(size)))
    else:
        outside = [n for n in layers if not -size <= n < size]
        chosen = [n % size for n in layers]
    if outside or not chosen or len(set(chosen)) < len(chosen):
        problem = f"{outside[0]} is not one" if outside else "one is given twice" if chosen else "that is none of them"
        raise ValueError(f"{path} has {size} layers, 0 to {size - 1}, and layers={_text(layers)}: {problem}.")
    return None if len(chosen) == size else tuple(sorted(chosen))


def layer_axis(weight: HasAxes) -> int:
    """The number of the first stack axis."""
    return weight.roles.index("stack")


def layers_of(array: Any, layers: tuple[int, ...] | None, weight: HasAxes) -> Any:
    """Some layers of an array of NumPy or JAX that has the axes of a weight; all of them if `layers` is None."""
    if layers is None:
        return array
    return array[(slice(None),) * layer_axis(weight) + (np.asarray(layers),)]


def _text(layers: Layers) -> str:
    if not isinstance(layers, slice):
        return str(layers)
    step = () if layers.step is None else (layers.step,)
    return f"slice({', '.join(str(n) for n in (layers.start, layers.stop, *step))})"
