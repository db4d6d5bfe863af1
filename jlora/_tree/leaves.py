"""Quantised leaves of a parameter tree, which are dequantised when a program needs the array."""

import abc
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np


class Quantized(abc.ABC):
    """A quantised weight: a pytree of parts, in the place of an array among the parameters.

    To add a format, write a subclass and register it as a pytree (`jax.tree_util.register_dataclass`).

    Attributes:
        shape: the shape of the dequantised weight.
        dtype: the dtype of the dequantised weight, floating-point.
        rowwise: whether the first axis of every part is the weight's first axis, so that a loop or a lookup may slice
            the parts and dequantise only what it needs. By default that holds for weights with three axes or more.
    """

    shape: Any
    dtype: Any

    @property
    def rowwise(self) -> bool:
        return len(self.shape) > 2

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
    """The array that a quantised leaf stands for."""
    return leaf.dequantize() if isinstance(leaf, Quantized) else sys.modules["qwix"].dequantize(_qwix(leaf))


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
    parts = jax.tree.leaves(leaf) if is_quantized(leaf) else [leaf]
    return next((getattr(part, "sharding", None) for part in parts if part.ndim == len(leaf.shape)), None)


def _qwix(node: Any) -> Any:
    """The qwix array in a node, which may also hold how it was quantised; None if there is none."""
    if "qwix" not in sys.modules:  # a program that has not imported qwix has no such array
        return None
    node = getattr(node, "array", node) if type(node).__module__.startswith("qwix.") else node
    return node if isinstance(node, sys.modules["qwix"].QArray) else None
