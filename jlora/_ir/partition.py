"""How the factors of a weight are cut over a mesh: each letter by the mesh axes of the weight's axis that it spells."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._ir.weight import AdaptedWeight, TensorNetwork


def index_axes(f: AdaptedWeight, spec: PartitionSpec, mesh: Any) -> dict[str, Any] | None:
    """For each letter its mesh axes: the major letter of an axis takes them all; None where they do not divide it."""
    out: dict[str, Any] = {}
    for axis, entry in zip(f.axes, (*spec, *[None] * (len(f.axes) - len(spec))), strict=True):
        if entry is not None and f.index(axis[0]).size % num_shards(entry, mesh):
            return None
        out |= {axis[0]: entry, **dict.fromkeys(axis[1:])}
    return out


def num_shards(entry: Any, mesh: Any) -> int:
    """How many pieces the mesh axes in one entry of a spec make."""
    count = 1
    for name in () if entry is None else entry if isinstance(entry, tuple) else (entry,):
        count *= mesh.shape[name]
    return count


def specs_like(f: AdaptedWeight, spec: PartitionSpec, cut: dict[str, Any]) -> AdaptedWeight:
    """The weight with a spec in the place of every array."""

    def of(term: str) -> PartitionSpec:
        return PartitionSpec(*(cut.get(c) for c in term))

    def network(n: TensorNetwork) -> TensorNetwork:
        return dataclasses.replace(n, factors=tuple(map(of, n.terms)), key=None if n.key is None else of(n.key_term))

    return dataclasses.replace(f.map(network), base=spec)


def shardings_like(f: AdaptedWeight, sharding: NamedSharding) -> AdaptedWeight:
    """The weight with a sharding in the place of every array: that of its base, and what follows from it."""
    specs = specs_like(f, sharding.spec, index_axes(f, sharding.spec, sharding.mesh) or {})
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
