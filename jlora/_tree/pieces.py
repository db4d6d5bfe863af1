"""Quantised leaves in pieces: their parts are cut over a mesh as the weight that they stand for."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jlora._tree.leaves import axis_order, blocks


def cut(leaf: Any, counts: Sequence[int], name: str) -> Any:
    """The quantised leaf with parts that can be cut into as many pieces along each axis as `counts` tells.

    Scales that belong to more than one piece are repeated. None if the format cannot be cut.

    Arguments:
        leaf: the weight.
        counts: one number for each axis of the weight.
        name: of the weight, for the error.

    Raises:
        ValueError: if the border of a piece is inside a block.
    """
    numbers = blocks(leaf)
    if numbers is None:
        return None
    for axis, (size, number, count) in enumerate(zip(leaf.shape, numbers, counts, strict=True)):
        if number % count:
            block, piece = size // number, size // count
            raise ValueError(
                f"{name} {tuple(leaf.shape)}: axis {axis} is cut into {count} pieces of {piece} entries, but {block} "
                f"neighbouring entries are one quantised block, so that a block straddles a cut. Quantise this weight "
                f"in blocks of {math.gcd(block, piece)} entries along that axis, cut another axis, or dequantise it."
            )

    def repeat(part: jax.Array) -> jax.Array:
        for axis, k in enumerate(axis_order(leaf) if part.ndim == len(leaf.shape) else ()):
            times = counts[k] // math.gcd(counts[k], part.shape[axis])
            part = jnp.repeat(part, times, axis) if times > 1 and part.shape[axis] > 1 else part
        return part

    return jax.tree.map(repeat, leaf)


def part_specs(leaf: Any, entries: Sequence[Any]) -> Any:
    """A quantised leaf with a `PartitionSpec` in the place of every part.

    Arguments:
        leaf: the weight, as `cut` returns it.
        entries: those of the weight's own spec, one for each axis.
    """

    def spec(part: jax.Array) -> PartitionSpec:
        order = axis_order(leaf) if part.ndim == len(leaf.shape) else ()
        return PartitionSpec(*(entries[k] if part.shape[axis] > 1 else None for axis, k in enumerate(order)))

    return jax.tree.map(spec, leaf)


def part_shardings(leaf: Any, sharding: NamedSharding) -> Any:
    """A quantised leaf with a sharding in the place of every part: that of the weight, on the axes that it divides."""
    spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
    can_be_cut = blocks(leaf) is not None

    def place(part: jax.Array) -> NamedSharding:
        order = axis_order(leaf) if can_be_cut and part.ndim == len(leaf.shape) else ()
        entries = [spec[k] for k in order]
        fits = [not n % num_shards(entry, sharding.mesh) for n, entry in zip(part.shape, entries, strict=False)]
        kept = [entry if fit else None for entry, fit in zip(entries, fits, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    return jax.tree.map(place, leaf)


def num_shards(entry: Any, mesh: Any) -> int:
    """The number of shards that one entry of a `PartitionSpec` makes of an axis."""
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names)
