"""Norms of a weight's columns or rows, without forming the weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._ir.algebra import align_axes
from jlora._ir.lazy import LazyArray, materialize
from jlora._ir.materialize import accumulation_dtype, einsum
from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices


def norm(f: AdaptedWeight, along: str) -> jax.Array:
    """The norm of a weight over all letters but some, without forming it; never zero."""
    if isinstance(f.base, LazyArray):  # its gradient makes the base again
        return jax.checkpoint(lambda f: _norm(dataclasses.replace(f, base=materialize(f.base)), along))(f)
    return _norm(f, along)


def _norm(f: AdaptedWeight, along: str) -> jax.Array:
    dtype = accumulation_dtype(f.dtype)
    base = materialize(f.base).reshape([f.size(c) for axis in f.axes for c in axis]).astype(dtype)
    letters = "".join(f.axes)
    for scale in f.axis_scales:
        base = base * align_axes(scale.vector.astype(dtype), scale.indices, letters)
    total = jnp.square(base).sum([k for k, c in enumerate(letters) if c not in along])
    order = "".join(c for c in letters if c in along)
    whole = TensorNetwork((base,), (letters,))
    for k, one in enumerate(f.networks):
        total = total + 2 * _inner(f, one, whole, order, dtype)
        for j, other in enumerate(f.networks[: k + 1]):
            total = total + (1 if j == k else 2) * _inner(f, one, other, order, dtype)
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(dtype).tiny)).transpose([order.index(c) for c in along])


def _inner(f: AdaptedWeight, one: TensorNetwork, other: TensorNetwork, along: str, dtype: Any) -> jax.Array:
    """The inner product of two networks over all letters of the weight but some."""
    own = [c for c in dict.fromkeys("".join(other.terms)) if c not in "".join(f.axes)]
    table = str.maketrans(dict(zip(own, fresh_indices([f.used(), *one.terms, *other.terms], len(own)), strict=True)))
    terms = [*one.terms, *(t.translate(table) for t in other.terms)]
    factors = [*one.factors, *other.factors]
    missing = "".join(c for axis in f.axes for c in axis if not any(c in t for t in terms))
    if missing:  # a letter that neither has is a broadcast
        terms.append(missing)
        factors.append(jnp.ones([f.size(c) for c in missing], dtype))
    return one.scale * other.scale * einsum(terms, factors, along, dtype)
