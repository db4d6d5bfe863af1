"""How the factors of a weight are partitioned over a mesh: each index as the weight's axis that it labels."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._ir.weight import AdaptedWeight
from jlora._tree.pieces import num_shards


def index_axes(f: AdaptedWeight, spec: PartitionSpec, mesh: Any) -> dict[str, Any] | None:
    """Maps each index to the mesh axes that shard it, None if they do not divide its size, or if a map sums over it.

    In a composite axis the major index takes all of the mesh axes.
    """
    out: dict[str, Any] = {}
    for axis, entry in zip(f.axes, (*spec, *[None] * (len(f.axes) - len(spec))), strict=True):
        if entry is not None and (axis[0] in f.mapped or f.index(axis[0]).size % num_shards(entry, mesh)):
            return None
        out |= {axis[0]: entry, **dict.fromkeys(axis[1:])}
    return out


def specs_like(f: AdaptedWeight, spec: PartitionSpec, mesh_axes: dict[str, Any]) -> AdaptedWeight:
    """The weight with a spec in the place of every array: `spec` for the base, by mesh axes for the others."""

    def spec_of(_: jax.Array, term: str) -> tuple[PartitionSpec, str]:
        return PartitionSpec(*(mesh_axes.get(c) for c in term)), term

    return dataclasses.replace(f.map_arrays(spec_of), base=spec)


def shardings_like(f: AdaptedWeight, sharding: NamedSharding) -> AdaptedWeight:
    """The weight with a sharding in the place of every array: that of its base, and those that follow from it."""
    specs = specs_like(f, sharding.spec, index_axes(f, sharding.spec, sharding.mesh) or {})
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
