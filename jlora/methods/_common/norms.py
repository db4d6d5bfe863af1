"""Norms of a weight's columns or rows, without materialising the weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._ir.algebra import align_axes
from jlora._ir.lazy import LazyArray, materialize
from jlora._ir.materialize import accumulation_dtype, einsum
from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.networks import UpdateLike, group_labels


def norm(w: AdaptedWeight, update: UpdateLike, along: str) -> jax.Array:
    """The norm of a weight over all of its axes but some; never zero.

        |W + s A B|^2 = |W|^2 + 2 <W, s A B> + |s A B|^2

    Arguments:
        w: the weight.
        update: what knows its axes.
        along: the groups of axes that stay, "*stack *out".

    Returns:
        an array with one axis for each of these axes.
    """
    labels, axes = group_labels(w, update), WeightAxes.of(update)
    indices = "".join(labels[group] for group in along.split())
    if isinstance(w.base, LazyArray):  # the backward pass dequantises the base again
        value = jax.checkpoint(lambda w: _norm(dataclasses.replace(w, base=materialize(w.base)), indices))(w)
    else:
        value = _norm(w, indices)
    return value.reshape([size for group in along.split() for size in axes.sizes(group)])


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
