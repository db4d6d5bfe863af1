"""A kind of weight: the shapes, the function that uses them, and the catalogue that holds all kinds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array
Params = dict[str, Array]
Inputs = dict[str, Array]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to hold and use weights.

    Arguments:
        name: the function's name.
        weights: the shapes of the weights that the adapter updates.
        rest: the shapes of parameters that the adapter does not update.
        inputs: the shapes of floating-point inputs, and the values of integer inputs.
        use: `use(params, inputs) -> y`.
        coarse: whether the program itself casts to bfloat16, so that float32 inputs do not make it exact.
        still: whether no gradient reaches the weight.
        limited: whether JAX can neither batch what consumes the weight nor differentiate it twice.
    """

    name: str
    weights: dict[str, Shape]
    rest: dict[str, Shape]
    inputs: dict[str, Shape | np.ndarray]
    use: Callable[[Params, Inputs], Array]
    coarse: bool = False
    still: bool = False
    limited: bool = False

    def values(self, rng: np.random.Generator, copies: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Random float32 parameters (`copies` of each, stacked, if that is not zero) and inputs."""
        lead = (copies,) if copies else ()

        def normal(shape: Shape) -> np.ndarray:
            return np.asarray(0.6 * rng.normal(size=shape), np.float32)

        params = {name: normal((*lead, *shape)) for name, shape in (self.weights | self.rest).items()}
        inputs = {name: v if isinstance(v, np.ndarray) else normal(v) for name, v in self.inputs.items()}
        return params, inputs


KINDS: list[Kind] = []


def kind(
    weights: Shape | Mapping[str, Shape],
    *,
    rest: Mapping[str, Shape] | None = None,
    flags: str = "",
    **inputs: Shape | np.ndarray,
) -> Callable[[Callable[..., Array]], None]:
    """Registers `fn(params, **inputs)`; weights given as one shape are the single weight `w`."""

    def register(fn: Callable[..., Array]) -> None:
        shapes = dict(weights) if isinstance(weights, Mapping) else {"w": weights}

        def use(params: Params, values: Inputs) -> Array:
            return fn(params, **values)

        marks = dict.fromkeys(flags.split(), True)
        KINDS.append(Kind(fn.__name__, shapes, dict(rest or {}), inputs, use, **marks))

    return register


def ids(*numbers: Any) -> np.ndarray:
    """Indices of rows."""
    return np.array(numbers, np.int32)


def bend(y: Array) -> Array:
    """A nonlinearity that compiles fast."""
    return y * y


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Eight devices, which the tests simulate; the compiler chooses every layout that a program does not specify."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
