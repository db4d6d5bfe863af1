"""Quantised leaves of a parameter tree, which are dequantised when a program needs the array."""

import abc
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes


class Quantized(abc.ABC):
    """A quantised weight: a pytree of parts, in the place of an array among the parameters.

    To add a format, write a subclass and register it as a pytree (`jax.tree_util.register_dataclass`).

    Attributes:
        shape: the shape of the dequantised weight.
        dtype: the dtype of the dequantised weight, floating-point.
        rowwise: whether the first axis of every part is the weight's first axis, so that a loop or a lookup may slice
            the parts and dequantise only what it needs. By default that holds for weights with three axes or more.
        blocks: into how many blocks each axis of the weight is divided that have to stay together, so that a
            `shard_map` may cut all parts as it cuts the weight. Each part has then all axes of the weight, or none of
            them; an axis on which a part has fewer entries than blocks belongs to scales. None (the default) if the
            parts cannot be cut: then the weight is dequantised before a `shard_map`.
        axis_order: the weight's axis that each axis of a part runs along. By default the parts have the order of the
            weight.
    """

    shape: Any
    dtype: Any

    @property
    def rowwise(self) -> bool:
        return len(self.shape) > 2

    @property
    def blocks(self) -> tuple[int, ...] | None:
        return None

    @property
    def axis_order(self) -> tuple[int, ...]:
        return tuple(range(len(self.shape)))

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """The weight as an array, in its shape and dtype."""

    @abc.abstractmethod
    def requantize(self, weight: jax.Array) -> Self:
        """Another weight of the same shape in the same format."""


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameter tree is one quantised weight: a `Quantized`, or a qwix array."""
    return isinstance(node, Quantized) or _qwix(node) is not None


def dequantize_leaf(leaf: Any) -> jax.Array:
    """The array that a quantised leaf stands for; on a mesh with Explicit axes it has the sharding of its parts."""

    def run(leaf: Any) -> jax.Array:
        return leaf.dequantize() if isinstance(leaf, Quantized) else sys.modules["qwix"].dequantize(_qwix(leaf))

    return _under_auto_axes(run, leaf, leaf, sharding(leaf))


def dequantize(tree: Any) -> Any:
    """Replaces every quantised weight by the array that it stands for.

    Arguments:
        tree: a quantised weight, or a tree that contains some, such as parameters from `jlora.quantize`.

    Returns:
        the tree with plain arrays; other leaves are not changed.

    Example:
        params = jlora.dequantize(jlora.quantize(params, sites, {".*kernel": "nf4"}))
    """
    return jax.tree.map(lambda leaf: dequantize_leaf(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)


def as_array(leaf: Any) -> jax.Array:
    """A parameter as an array, quantised or not."""
    return dequantize_leaf(leaf) if is_quantized(leaf) else jnp.asarray(leaf)


def requantize(leaf: Any, weight: jax.Array) -> Any:
    """Another weight in the format of a quantised leaf, with new scales."""
    return _under_auto_axes(lambda w: _requantize(leaf, w), weight, leaf, jax.tree.map(_placement, leaf))


def _requantize(leaf: Any, weight: jax.Array) -> Any:
    if isinstance(leaf, Quantized):
        return leaf.requantize(weight)
    array: Any = _qwix(leaf)
    tiles = [n // m for n, m in zip(array.shape, array.scale.shape, strict=True)]
    new = sys.modules["qwix"].quantize(
        weight.astype(array.scale.dtype),
        array.qtype,
        channelwise_axes=[k for k, tile in enumerate(tiles) if tile == 1],
        tiled_axes={k: tile for k, tile in enumerate(tiles) if 1 < tile < array.shape[k]},
        calibration_method="absmax" if array.zero_point is None else "minmax",
    )
    return new if leaf is array else dataclasses.replace(leaf, array=new)


def with_leading_axis(leaf: Any, length: int) -> Any:
    """The quantised leaf with the weight's first axis as the first axis of every part; None if it has no such form."""

    def broadcast(part: jax.Array) -> jax.Array:
        return jnp.broadcast_to(part, (length, *part.shape[1:])) if part.shape[:1] == (1,) else part

    if isinstance(leaf, Quantized) and not leaf.rowwise:
        return None
    leaf = jax.tree.map(broadcast, leaf)
    return leaf if all(part.shape[:1] == (length,) for part in jax.tree.leaves(leaf)) else None


def layer_of(leaf: Any, index: Mapping[int, int]) -> np.ndarray:
    """The entries of a parameter at a position along some axes, as a NumPy array.

    Of a quantised stack only that layer is dequantised, if its format can be sliced along the first axis.

    Arguments:
        leaf: the parameter: an array, a quantised weight, or an object that is indexed as an array is and reads a file.
        index: the position along each axis that the result lacks.
    """
    if is_quantized(leaf):
        rows = with_leading_axis(leaf, leaf.shape[0]) if 0 in index else None
        if rows is not None:
            leaf = jax.tree.map(lambda part: part[index[0]], rows)
            index = {axis - 1: position for axis, position in index.items() if axis}
        leaf = dequantize_leaf(leaf)
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        leaf = np.asarray(leaf)
    return np.asarray(leaf[tuple(index.get(axis, slice(None)) for axis in range(len(leaf.shape)))])


def sharding(leaf: Any) -> Any:
    """The sharding of a parameter; of a quantised one, that of its first part with as many axes as the weight."""
    if not is_quantized(leaf):
        return getattr(leaf, "sharding", None)
    placement = next((_placement(part) for part in jax.tree.leaves(leaf) if part.ndim == len(leaf.shape)), None)
    if not isinstance(placement, NamedSharding):
        return placement
    entries = dict(zip(axis_order(leaf), placement.spec, strict=False))
    return placement.update(spec=PartitionSpec(*(entries.get(k) for k in range(len(leaf.shape)))))


def _placement(part: Any) -> Any:
    """The sharding of an array; of a traced one that in its type, if the mesh has Explicit axes."""
    placement = getattr(part, "sharding", None)
    typed = jax.typeof(part).sharding if placement is None and isinstance(part, jax.Array) else None
    return typed if explicit_axes(typed) else placement


def explicit_axes(placement: Any) -> tuple[Any, ...]:
    """The Explicit axes of a sharding's mesh."""
    if not isinstance(placement, NamedSharding):
        return ()
    kinds = zip(placement.mesh.axis_names, placement.mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _under_auto_axes(fun: Callable[[Any], Any], operand: Any, leaf: Any, out: Any) -> Any:
    """`fun(operand)`, in which the Explicit axes of a leaf's mesh are Auto; `out` are the result's shardings."""
    placement = sharding(leaf)
    axes = explicit_axes(placement)
    if not axes:
        return fun(operand)
    with jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh):
        run: Any = auto_axes(fun, axes=axes, out_sharding=out)
        return run(operand)


def axis_order(leaf: Any) -> tuple[int, ...]:
    """The weight's axis for each axis of a quantised leaf's parts."""
    return leaf.axis_order if isinstance(leaf, Quantized) else tuple(range(len(leaf.shape)))


def blocks(leaf: Any) -> tuple[int, ...] | None:
    """Into how many blocks each axis of a quantised leaf is divided; None if it cannot be cut."""
    if isinstance(leaf, Quantized):
        return leaf.blocks
    array: Any = _qwix(leaf)
    return tuple(n if m == 1 else m for n, m in zip(array.shape, array.scale.shape, strict=True))


def _qwix(node: Any) -> Any:
    """The qwix array in a node, which may also hold how it was quantised; None if there is none."""
    if "qwix" not in sys.modules:  # a program that has not imported qwix has no such array
        return None
    node = getattr(node, "array", node) if type(node).__module__.startswith("qwix.") else node
    return node if isinstance(node, sys.modules["qwix"].QArray) else None
