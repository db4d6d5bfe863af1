"""The dense value of an adapted weight, of its update, and of one network."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._ir.algebra import align_axes, merge_indices, take_picks
from jlora._ir.explicit_mesh import explicit_axes, type_sharding, under_auto_axes
from jlora._ir.lazy import materialize
from jlora._ir.partition import index_axes
from jlora._ir.probe import Probe
from jlora._ir.structured import StructuredNetwork, with_matrices
from jlora._ir.weight import AdaptedWeight, AxisMap, TensorNetwork


def dense(f: AdaptedWeight, dtype: jnp.dtype | None = None) -> jax.Array:
    """The weight's value, `maps(base) + sum of networks`: computed in float32 (or wider), rounded once.

    Arguments:
        f: the weight.
        dtype: of the result; that of the weight by default.
    """
    dtype, f = f.dtype if dtype is None else dtype, take_picks(with_matrices(f))
    if not f.networks and not f.maps:
        return materialize(f.base).astype(dtype)
    return under_auto_axes(lambda f: _dense(f, accumulation_dtype(f.dtype)).astype(dtype), f.base)(f)


def _dense(f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    value = _mapped_base(f, dtype)
    return value + delta(f, dtype) if f.networks else value


def _mapped_base(f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    value = materialize(f.base).astype(dtype)
    for m in f.maps:
        value = apply_map(m, f, value)
    return value


def apply_map(m: AxisMap, f: AdaptedWeight, value: jax.Array) -> jax.Array:
    """A map of a value in the shape of the weight.

    Arguments:
        m: the map, of the indices of `f`.
        f: the weight.
        value: any array of its shape.
    """
    array = m.array.astype(value.dtype)
    if not m.new:
        return value * _broadcast(array, m.indices, f)
    before = f.labels.translate(str.maketrans(m.new, m.old))
    split = value.reshape([f.size(c) for c in f.labels])
    return einsum([m.indices, before], [array, split], f.labels, value.dtype).reshape(value.shape)


def without_maps(f: AdaptedWeight) -> AdaptedWeight:
    """The weight without maps that sum over indices: what they add to the base is a network as large as the weight.

    The maps of a weight all of whose maps are multipliers stay, as they commute with what is done to the base.
    """
    if not f.mapped:
        return f
    f = with_matrices(f)

    def added(f: AdaptedWeight) -> jax.Array:
        dtype = accumulation_dtype(f.dtype)
        change = _mapped_base(f, dtype) - materialize(f.base).astype(dtype)
        return change.reshape([f.size(c) for c in f.labels])

    placed = None
    if explicit_axes(f.base):
        sharding = type_sharding(f.base)
        mesh_axes = index_axes(f, sharding.spec, sharding.mesh) or {}
        placed = NamedSharding(sharding.mesh, PartitionSpec(*(mesh_axes.get(c) for c in f.labels)))
    network = TensorNetwork((under_auto_axes(added, f.base, placed)(f),), (f.labels,))
    return merge_indices(dataclasses.replace(f, networks=(network, *f.networks), maps=()))


def without_maps_along(f: AdaptedWeight, axes: Iterable[int]) -> AdaptedWeight:
    """The weight, `without_maps` if a map sums over an index of one of these axes."""
    return without_maps(f) if set(f.mapped) & {c for k in axes for c in f.axes[k]} else f


def with_dense_base(f: AdaptedWeight) -> AdaptedWeight:
    """The weight with its base materialised if that is lazy; its networks stay as they are."""
    return dataclasses.replace(f, base=materialize(f.base))


def fold_full_rank(f: AdaptedWeight) -> tuple[AdaptedWeight, bool]:
    """Adds the networks that are as large as the weight to its base; the second result is whether there are any.

    Two products, one with the base and one with the update, cost more than this sum.
    """
    full = [n for n in f.networks if n.key is None and f.is_full_rank_network(n)]
    return (fold(f, full), True) if full else (f, False)


def fold(f: AdaptedWeight, networks: Sequence[TensorNetwork]) -> AdaptedWeight:
    """The weight with some of its networks added to its base, after its maps."""
    base = dense(dataclasses.replace(f, networks=tuple(networks)))
    rest = tuple(n for n in f.networks if not any(n is other for other in networks))
    return dataclasses.replace(f, base=base, networks=rest, maps=())


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Float32, or a wider or complex dtype itself. Not `jnp.promote_types`, which strict promotion forbids."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(dtype)
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def widest_dtype(tree: Any) -> jnp.dtype:
    """Float32, or the widest dtype of the floating-point arrays of a tree if that is wider."""
    dtypes = [a.dtype for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return max(map(accumulation_dtype, dtypes), key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def delta(f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    """The sum of the networks, in the shape of the weight."""
    total = jnp.zeros(f.shape, dtype)
    for network in f.networks:
        if isinstance(network, Probe):  # it adds nothing
            continue
        total = total + broadcast_network(network, f, dtype)
    return total


def broadcast_network(network: TensorNetwork, f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    """A network's value in the shape of the weight, `scale * einsum(factors, terms -> axes)`."""
    network = network.matrix(f.labels, f.sizes) if isinstance(network, StructuredNetwork) else network
    term = "".join(c for c in f.labels if any(c in t for t in network.terms))
    value = _broadcast(einsum(network.terms, network.factors, term, dtype), term, f)
    return value * jnp.asarray(network.scale, dtype)


def _broadcast(array: jax.Array, term: str, f: AdaptedWeight) -> jax.Array:
    value = align_axes(array, term, f.labels)
    return jnp.broadcast_to(value, [f.size(c) for c in f.labels]).reshape(f.shape)


def einsum(terms: Sequence[str], factors: Sequence[jax.Array], out: str, dtype: jnp.dtype) -> jax.Array:
    """`jnp.einsum` of factors in one dtype, at full float32 precision."""
    arrays = [factor.astype(dtype) for factor in factors]
    return jnp.einsum(f"{','.join(terms)}->{out}", *arrays, precision=lax.Precision.HIGHEST)
