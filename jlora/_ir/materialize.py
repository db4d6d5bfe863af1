"""The dense value of an adapted weight, of its update, and of one network."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jlora._ir.algebra import align_axes, take_picks
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.lazy import materialize
from jlora._ir.probe import Probe
from jlora._ir.weight import AdaptedWeight, AxisScale, TensorNetwork


def dense(f: AdaptedWeight, dtype: jnp.dtype | None = None) -> jax.Array:
    """The weight's value, `base * axis scales + sum of networks`: computed in float32 (or wider), rounded once.

    Arguments:
        f: the weight.
        dtype: of the result; that of the weight by default.
    """
    dtype, f = f.dtype if dtype is None else dtype, take_picks(f)
    if not f.networks and not f.axis_scales:
        return materialize(f.base).astype(dtype)
    return under_auto_axes(lambda f: _dense(f, accumulation_dtype(f.dtype)).astype(dtype), f.base)(f)


def _dense(f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    value = materialize(f.base).astype(dtype)
    for scale in f.axis_scales:
        value = value * broadcast_axis_scale(scale, f, dtype)
    return value + delta(f, dtype) if f.networks else value


def with_dense_base(f: AdaptedWeight) -> AdaptedWeight:
    """The weight with its base materialised if that is lazy; its networks stay as they are."""
    return dataclasses.replace(f, base=materialize(f.base))


def fold_full_rank(f: AdaptedWeight) -> tuple[AdaptedWeight, bool]:
    """Adds the networks that are as large as the weight to its base; the second result is whether there are any.

    Two products, one with the base and one with the update, cost more than this sum.
    """
    full, thin = [], []
    for n in f.networks:
        (full if n.key is None and f.is_full_rank_network(n) else thin).append(n)
    if not full:
        return f, False
    base = dense(dataclasses.replace(f, networks=tuple(full)))
    return dataclasses.replace(f, base=base, networks=tuple(thin), axis_scales=()), True


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Float32, or the dtype itself if it is wider. Not `jnp.promote_types`, which strict promotion forbids."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


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
    term = "".join(c for c in f.labels if any(c in t for t in network.terms))
    value = _broadcast(einsum(network.terms, network.factors, term, dtype), term, f)
    return value * jnp.asarray(network.scale, dtype)


def broadcast_axis_scale(scale: AxisScale, f: AdaptedWeight, dtype: jnp.dtype) -> jax.Array:
    """The multiplier of every entry of the weight."""
    return _broadcast(scale.vector.astype(dtype), scale.indices, f)


def _broadcast(array: jax.Array, term: str, f: AdaptedWeight) -> jax.Array:
    value = align_axes(array, term, f.labels)
    return jnp.broadcast_to(value, [f.size(c) for c in f.labels]).reshape(f.shape)


def einsum(terms: Sequence[str], factors: Sequence[jax.Array], out: str, dtype: jnp.dtype) -> jax.Array:
    """`jnp.einsum` of factors in one dtype, at full float32 precision."""
    arrays = [factor.astype(dtype) for factor in factors]
    return jnp.einsum(f"{','.join(terms)}->{out}", *arrays, precision=lax.Precision.HIGHEST)
