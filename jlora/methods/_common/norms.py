"""Norms of a weight's columns or rows, without materialising the weight."""

import dataclasses

import jax
import jax.numpy as jnp

from jlora._ir.algebra import align_axes
from jlora._ir.lazy import LazyArray, materialize
from jlora._ir.materialize import accumulation_dtype, einsum, without_maps
from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.networks import UpdateLike, group_labels


def norm(w: AdaptedWeight, update: UpdateLike, along: str) -> jax.Array:
    """The Frobenius norm of a weight over all axes except those of `along`; never zero.

        |W + s A B|^2 = |W|^2 + 2 <W, s A B> + |s A B|^2

    Arguments:
        w: the weight.
        update: the update, with the shape and roles of the weight.
        along: the groups of axes that the result keeps, "*stack *out".

    Returns:
        an array with one axis for each of these axes, in float32 or wider.
    """
    axes, groups = WeightAxes.of(update), along.split()

    def of_arrays(w: AdaptedWeight) -> jax.Array:
        w = without_maps(dataclasses.replace(w, base=materialize(w.base)))
        labels = group_labels(w, update)  # without maps an axis may have fewer indices
        return _norm(w, "".join(labels[group] for group in groups))

    # The backward pass dequantises a quantised base again.
    value = (jax.checkpoint(of_arrays) if isinstance(w.base, LazyArray) else of_arrays)(w)
    return value.reshape([size for group in groups for size in axes.sizes(group)])


def _norm(w: AdaptedWeight, along: str) -> jax.Array:
    """The norm for every value of the indices `along`, with one axis for each; no map sums over indices."""
    dtype = accumulation_dtype(w.dtype)
    base = materialize(w.base).reshape([w.size(index) for index in w.labels]).astype(dtype)
    for m in w.maps:
        base = base * align_axes(m.array.astype(dtype), m.indices, w.labels)
    total = jnp.square(base).sum([axis for axis, index in enumerate(w.labels) if index not in along])
    order = "".join(index for index in w.labels if index in along)
    base_network = TensorNetwork((base,), (w.labels,))
    for k, network in enumerate(w.networks):
        total = total + 2 * _inner(w, network, base_network, order, dtype)
        for j, other in enumerate(w.networks[: k + 1]):
            total = total + (1 if j == k else 2) * _inner(w, network, other, order, dtype)
    return jnp.sqrt(jnp.maximum(total, jnp.finfo(dtype).tiny)).transpose([order.index(index) for index in along])


def _inner(w: AdaptedWeight, first: TensorNetwork, second: TensorNetwork, along: str, dtype: jnp.dtype) -> jax.Array:
    """The inner product of two networks over all indices of the weight except `along`."""
    summed = [index for index in dict.fromkeys("".join(second.terms)) if index not in w.labels]
    fresh = fresh_indices([w.used(), *first.terms, *second.terms], len(summed))
    table = str.maketrans(dict(zip(summed, fresh, strict=True)))
    terms = [*first.terms, *(term.translate(table) for term in second.terms)]
    factors = [*first.factors, *second.factors]
    missing = "".join(index for index in w.labels if not any(index in term for term in terms))
    if missing:  # both networks are constant along these indices
        terms.append(missing)
        factors.append(jnp.ones([w.size(index) for index in missing], dtype))
    return first.scale * second.scale * einsum(terms, factors, along, dtype)
