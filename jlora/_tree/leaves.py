"""Weights in fewer bits: what stands in a parameter tree for an array that is only made where a program needs it."""

import abc
import dataclasses
import sys
from typing import Any, Self

import jax
import jax.numpy as jnp


class Quantized(abc.ABC):
    """A weight in fewer bits, a pytree of its parts that stands in the parameters where the program wants an array.

    A subclass is a pytree (`jax.tree_util.register_dataclass`).

    Attributes:
        shape: of the weight that it stands for.
        dtype: of that weight, floating-point.
        rowwise: whether the first axis of every part is the weight's first, so that a loop or a lookup may cut the
            parts and make what it needs alone. Unless a subclass says otherwise, of weights with three axes or more.
    """

    shape: Any
    dtype: Any

    @property
    def rowwise(self) -> bool:
        return len(self.shape) > 2

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """The weight itself, in its shape and dtype."""

    @abc.abstractmethod
    def requantize(self, weight: jax.Array) -> Self:
        """Another weight of the shape in the same form."""


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameter tree is one weight in fewer bits, a qwix array among others."""
    return isinstance(node, Quantized) or _qwix(node) is not None


def dequantize(leaf: Any) -> jax.Array:
    """The weight that a quantised leaf stands for."""
    return leaf.dequantize() if isinstance(leaf, Quantized) else sys.modules["qwix"].dequantize(_qwix(leaf))


def as_array(leaf: Any) -> jax.Array:
    """A parameter as an array, quantised or not."""
    return dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf)


def requantize(leaf: Any, weight: jax.Array) -> Any:
    """Another weight in the form of a quantised leaf, with scales of its own."""
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
    """The leaf with the weight's first axis as the first of every part, None where it has no such form."""

    def whole(part: jax.Array) -> jax.Array:
        return jnp.broadcast_to(part, (length, *part.shape[1:])) if part.shape[:1] == (1,) else part

    if isinstance(leaf, Quantized) and not leaf.rowwise:
        return None
    leaf = jax.tree.map(whole, leaf)
    return leaf if all(part.shape[:1] == (length,) for part in jax.tree.leaves(leaf)) else None


def sharding(leaf: Any) -> Any:
    """Where a parameter lies; for a quantised one, where its first part of as many axes does."""
    parts = jax.tree.leaves(leaf) if is_quantized(leaf) else [leaf]
    return next((getattr(part, "sharding", None) for part in parts if part.ndim == len(leaf.shape)), None)


def _qwix(node: Any) -> Any:
    """The qwix array in a node, which may hold beside it how it was made; None where there is none."""
    if "qwix" not in sys.modules:  # a program without qwix has no such array
        return None
    node = getattr(node, "array", node) if type(node).__module__.startswith("qwix.") else node
    return node if isinstance(node, sys.modules["qwix"].QArray) else None
