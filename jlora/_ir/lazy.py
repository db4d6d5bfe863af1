"""Lazy dequantisation: weights are dequantised by the equation that consumes them, and again in its backward pass.

What a program does to such a weight before it uses it (transpose, cast, join, ...) is deferred with it. Lazy zeros are
the base of a weight of which only the update is wanted: no product with them is computed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat
from jlora._compat import Eqn
from jlora._tree import leaves, pieces

# They act on every entry alone, so that they may come after a slice along the first axis as well as before.
_ELEMENTWISE = ("convert_element_type", "stop_gradient", "copy")
# Zero if the first operand is, whatever the others are (positions, factors).
_ZERO_IF_FIRST_IS = ("mul", "div", "dynamic_slice")
# Zero if either of the first two operands is.
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


class _Step:
    """An equation, equal to itself alone."""

    def __init__(self, eqn: Eqn) -> None:
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
    """An array that is not computed yet: a quantised leaf, zeros, or one result of an equation on such arrays.

    Arguments:
        operands: of the equation; of a leaf, the leaf alone; of zeros, nothing.
        step: the equation, None for a leaf and for zeros.
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

    @property
    def sharding(self) -> Any:
        """The sharding of the array on a mesh with Explicit axes, from the parts; elsewhere it may be None."""
        if self.step is None:
            return leaves.sharding(self.operands[0]) if self.operands else None
        placed = [v.sharding if isinstance(v, LazyArray) else jax.typeof(v).sharding for v in self.operands]
        eqn, explicit = self.step.eqn, next(filter(leaves.explicit_axes, placed), None)
        if explicit is None or eqn.primitive.name in _ELEMENTWISE:
            return explicit
        if eqn.primitive.name == "transpose":
            entries = (*explicit.spec, *[None] * (self.ndim - len(explicit.spec)))
            return explicit.update(spec=PartitionSpec(*(entries[k] for k in eqn.params["permutation"])))
        return explicit.update(spec=_compat.aval(eqn.outvars[self.number]).sharding.spec)


def lazy_leaf(node: Any) -> LazyArray:
    """Wraps a quantised leaf of the parameters, which stays quantised."""
    return LazyArray((node,), None, 0, tuple(node.shape), jnp.dtype(node.dtype))


def zeros(shape: Sequence[int], dtype: Any) -> LazyArray:
    """Zeros that products skip."""
    return LazyArray((), None, 0, tuple(shape), jnp.dtype(dtype))


def is_zero(array: Any) -> bool:
    """Whether the value is an array from `zeros`."""
    return isinstance(array, LazyArray) and array.step is None and not array.operands


def is_deferred(array: Any) -> bool:
    """Whether the value is the result of an equation that was deferred."""
    return isinstance(array, LazyArray) and array.step is not None


def materialize(array: Any) -> Any:
    """The array's value; an array that is not lazy is returned as it is."""
    if not isinstance(array, LazyArray):
        return array
    if is_zero(array):
        return jnp.zeros(array.shape, array.dtype)
    if array.step is None:
        return leaves.dequantize_leaf(array.operands[0])
    return _compat.bind(array.step.eqn, *map(materialize, array.operands))[array.number]


def bind(eqn: Eqn, *operands: Any) -> list[Any]:
    """Evaluates an equation whose result is still a weight; it is deferred if an operand is lazy.

    Arguments:
        eqn: the equation.
        operands: one for each of its inputs: arrays, and the base in the place of an adapted weight.

    Returns:
        one base for each output.
    """
    if not any(isinstance(v, LazyArray) for v in operands):
        return _compat.bind(eqn, *operands)
    outputs = [_compat.aval(var) for var in eqn.outvars]
    name = eqn.primitive.name
    is_product_with_zeros = name in _PRODUCTS and any(map(is_zero, operands[:2]))
    if all(map(is_zero, operands)) or (is_zero(operands[0]) and name in _ZERO_IF_FIRST_IS) or is_product_with_zeros:
        return [zeros(out.shape, out.dtype) for out in outputs]
    return [LazyArray(operands, _Step(eqn), k, tuple(out.shape), out.dtype) for k, out in enumerate(outputs)]


def consume(eqn: Eqn, *operands: Any) -> list[Any]:
    """Evaluates an equation on the operands' values. Lazy ones are materialised here, and again for the gradient.

    Products with lazy zeros are not computed.

    Arguments:
        eqn: the equation.
        operands: as for `bind`.

    Returns:
        one array for each output.
    """
    if not any(isinstance(v, LazyArray) for v in operands):
        return _compat.bind(eqn, *operands)
    if eqn.primitive.name in _PRODUCTS and any(map(is_zero, operands)):
        outputs = [_compat.aval(var) for var in eqn.outvars]
        return [jnp.zeros(out.shape, out.dtype) for out in outputs]
    return jax.checkpoint(lambda operands: _compat.bind(eqn, *map(materialize, operands)))(operands)


def gather_rows(array: LazyArray, positions: jax.Array) -> jax.Array | None:
    """The entries along the first axis at positions within bounds; only these are dequantised.

    None if the array's format cannot be sliced along its first axis.
    """
    sliceable = with_leading_axis(array, array.shape[0])
    if sliceable is None:
        return None

    def entry(part: LazyArray) -> jax.Array:
        return materialize(slice_leading(part))

    if is_zero(array):
        return jnp.zeros((*positions.shape, *array.shape[1:]), array.dtype)
    for _ in range(positions.ndim):
        entry = jax.vmap(entry)
    return entry(jax.tree.map(lambda part: part.at[positions].get(mode="promise_in_bounds"), sliceable))


def cut(array: LazyArray, counts: Sequence[int], name: str) -> LazyArray | None:
    """The array with parts that can be cut into as many pieces along each axis as `counts` tells.

    None if what the program did to the array depends on its size.

    Raises:
        ValueError: if the border of a piece is inside a quantised block.
    """
    return _on_leaf(array, counts, lambda leaf, counts: pieces.cut(leaf, counts, name))


def part_specs(array: LazyArray, entries: Sequence[Any]) -> Any:
    """The array with a `PartitionSpec` in the place of every part, from the entries of its own spec."""
    return _on_leaf(array, entries, pieces.part_specs)


def reshard(array: LazyArray, sharding: NamedSharding) -> LazyArray | None:
    """The array with its parts resharded as the array is, None if they cannot be placed so."""
    entries = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]

    def move(leaf: Any, entries: Sequence[Any]) -> Any:
        target = sharding.update(spec=PartitionSpec(*entries))
        places = pieces.part_shardings(leaf, target)
        placed = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), leaf, places)
        return jax.sharding.reshard(leaf, places) if leaves.sharding(placed) == target else None

    return _on_leaf(array, entries, move)


def piece(array: LazyArray, counts: Sequence[int]) -> Any:
    """An array as one device sees it: its parts are pieces already, and its shape follows."""
    shape = tuple(n // count for n, count in zip(array.shape, counts, strict=True))
    return dataclasses.replace(_on_leaf(array, counts, lambda leaf, _: leaf, piece), shape=shape)


def _on_leaf(array: LazyArray, per_axis: Sequence[Any], fn: Callable[..., Any], step: Any = None) -> Any:
    """Applies `fn(leaf, per_axis)` to the quantised leaf of an array, with the entries in the order of its axes.

    None if `fn` returns None, or if a step is neither elementwise nor a transposition.

    Arguments:
        array: the array.
        per_axis: one entry for each axis.
        fn: the function.
        step: `step(operand, per_axis)` replaces the operand of a step; by default by this function.
    """
    if is_zero(array):
        return array
    if array.step is None:
        operand = fn(array.operands[0], per_axis)
        return None if operand is None else dataclasses.replace(array, operands=(operand,))
    eqn = array.step.eqn
    if eqn.primitive.name == "transpose":
        permutation = eqn.params["permutation"]
        per_axis = [per_axis[permutation.index(k)] for k in range(array.ndim)]
    elif eqn.primitive.name not in _ELEMENTWISE:
        return None
    operand = step(array.operands[0], per_axis) if step else _on_leaf(array.operands[0], per_axis, fn)
    return None if operand is None else dataclasses.replace(array, operands=(operand,))


def with_leading_axis(array: Any, length: int) -> Any:
    """The array in a form that a loop can slice along its first axis, None if there is no such form."""
    if not isinstance(array, LazyArray) or is_zero(array):
        return array
    if array.step is None:
        leaf = leaves.with_leading_axis(array.operands[0], length)
        return None if leaf is None else dataclasses.replace(array, operands=(leaf,))
    if array.step.eqn.primitive.name not in _ELEMENTWISE:
        return None
    operand = with_leading_axis(array.operands[0], length)
    return None if operand is None else dataclasses.replace(array, operands=(operand,))


def slice_leading(array: Any) -> Any:
    """A stacked array as one step of a loop receives it: its parts are sliced already, and its shape follows."""
    if not isinstance(array, LazyArray):
        return array
    operands: Sequence[Any] = array.operands if array.step is None else tuple(map(slice_leading, array.operands))
    return dataclasses.replace(array, operands=tuple(operands), shape=array.shape[1:])
