"""Frozen arrays that are made where a product consumes them, and made again for its gradient: quantised weights.

What a program does to such a weight before it uses it (transpose, cast, join, ...) is put off with it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._tree import leaves as _quantized

# What acts on every entry alone, so that it may come after a cut along the first axis as well as before.
_ELEMENTWISE = ("convert_element_type", "stop_gradient", "copy")


class _Step:
    """An equation, equal to itself alone."""

    def __init__(self, eqn: Any) -> None:
        self.eqn = eqn

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Step) and other.eqn is self.eqn

    def __hash__(self) -> int:
        return id(self.eqn)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["step", "number", "shape", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array to be made: a quantised leaf, or one result of an equation on such arrays and others.

    Arguments:
        operands: of the equation; of a leaf, the leaf alone.
        step: the equation, None for a leaf.
        number: which of the equation's results.
        shape, dtype: of the array.
    """

    operands: tuple[Any, ...]
    step: _Step | None
    number: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def lazy_leaf(node: Any) -> LazyArray:
    """A quantised leaf of the parameters, which is not made yet."""
    return LazyArray((node,), None, 0, tuple(node.shape), jnp.dtype(node.dtype))


def materialize(array: Any) -> Any:
    """The array itself."""
    if not isinstance(array, LazyArray):
        return array
    if array.step is None:
        return _quantized.dequantize(array.operands[0])
    return _compat.bind(array.step.eqn, *map(materialize, array.operands))[array.number]


def bind(eqn: Any, *operands: Any) -> list[Any]:
    """An equation that leaves a weight a weight: put off where an operand is."""
    if not any(isinstance(v, LazyArray) for v in operands):
        return _compat.bind(eqn, *operands)
    return [
        LazyArray(operands, _Step(eqn), number, tuple(var.aval.shape), var.aval.dtype)
        for number, var in enumerate(eqn.outvars)
    ]


def consume(eqn: Any, *operands: Any) -> list[Any]:
    """An equation that needs its operands now; what was put off is made here and, for the gradient, made again."""
    if not any(isinstance(v, LazyArray) for v in operands):
        return _compat.bind(eqn, *operands)
    return jax.checkpoint(lambda operands: _compat.bind(eqn, *map(materialize, operands)))(operands)


def gather_rows(array: LazyArray, indices: jax.Array) -> jax.Array | None:
    """The entries along the first axis at indices within bounds, made of their own parts alone.

    None where the array has no such parts.
    """
    whole = with_leading_axis(array, array.shape[0])
    if whole is None:
        return None

    def make(one: LazyArray) -> jax.Array:
        return materialize(slice_leading(one))

    for _ in range(indices.ndim):
        make = jax.vmap(make)
    return make(jax.tree.map(lambda part: part.at[indices].get(mode="promise_in_bounds"), whole))


def with_leading_axis(array: Any, length: int) -> Any:
    """The array in a form that a loop can cut along its first axis, None where it has none."""
    if not isinstance(array, LazyArray):
        return array
    if array.step is None:
        whole = _quantized.with_leading_axis(array.operands[0], length)
        return None if whole is None else dataclasses.replace(array, operands=(whole,))
    if array.step.eqn.primitive.name not in _ELEMENTWISE:
        return None
    inner = with_leading_axis(array.operands[0], length)
    return None if inner is None else dataclasses.replace(array, operands=(inner,))


def slice_leading(array: Any) -> Any:
    """What a loop's step finds of a stacked array: its parts were cut, and its shape has to follow."""
    if not isinstance(array, LazyArray):
        return array
    operands: Sequence[Any] = array.operands if array.step is None else tuple(map(slice_leading, array.operands))
    return dataclasses.replace(array, operands=operands, shape=array.shape[1:])
