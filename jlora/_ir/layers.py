"""Some entries of a weight along one index, such as some layers of a stack: taken out, and put back changed."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._ir import lazy
from jlora._ir.algebra import align_axes, map_index, rename_indices, split_index
from jlora._ir.weight import AdaptedWeight, AxisMap, TensorNetwork, at_index


def take_entries(f: AdaptedWeight, axis: int, positions: Sequence[int], *, reads_base: bool) -> AdaptedWeight:
    """The weight at some positions along an axis, with the updates that it has there.

    Arguments:
        f: the weight.
        axis: its number; it has one index.
        positions: along the axis, in rising order.
        reads_base: whether the value of the base is needed. If not, the result has zeros in its place.
    """
    shape = (*f.shape[:axis], len(positions), *f.shape[axis + 1 :])
    base = _take_base(f.base, axis, positions) if reads_base else lazy.zeros(shape, f.dtype)
    taken = map_index(f, f.axes[axis], lambda array, k: _take(array, k, positions), len(positions))
    return dataclasses.replace(taken, base=base)


def put_entries(
    f: AdaptedWeight, before: AdaptedWeight, after: AdaptedWeight, axis: int, positions: Sequence[int]
) -> AdaptedWeight:
    """The weight with updates at some positions along an axis, and as it is at all others.

    Arguments:
        f: the weight.
        before: of `take_entries`.
        after: the same weight with an update; its base is ignored.
        axis, positions: as for `take_entries`.
    """
    name, size = f.axes[axis], f.shape[axis]
    f = _split_as(f, after)
    kept = len(f.networks)
    if not all(old is new for old, new in zip(before.networks, after.networks, strict=False)):
        outside = _outside(positions, size)
        f, kept = dataclasses.replace(f, networks=tuple(_masked(n, name, outside) for n in f.networks)), 0
    networks = tuple(_put_network(n, name, positions, size) for n in after.networks[kept:])
    maps = tuple(_put_map(m, name, positions, size) for m in after.maps[len(f.maps) :])
    return dataclasses.replace(f, networks=(*f.networks, *networks), maps=(*f.maps, *maps))


def _take_base(base: Any, axis: int, positions: Sequence[int]) -> Any:
    if not isinstance(base, lazy.LazyArray):
        return _take(base, axis, positions)
    rows = lazy.gather_rows(base, jnp.asarray(positions)) if axis == 0 else None
    return _take(lazy.materialize(base), axis, positions) if rows is None else rows


def _stride(positions: Sequence[int]) -> int:
    """The distance between neighbours; 0 if they have different ones."""
    steps = {after - before for before, after in itertools.pairwise(positions)}
    return 1 if not steps else steps.pop() if len(steps) == 1 else 0


def _take(array: jax.Array, axis: int, positions: Sequence[int]) -> jax.Array:
    if _is_key(array) or not (stride := _stride(positions)):
        return jnp.take(array, np.asarray(positions), axis)
    return lax.slice_in_dim(array, positions[0], positions[-1] + 1, stride, axis)


def _put(array: jax.Array, axis: int, positions: Sequence[int], size: int) -> jax.Array:
    """The array at its positions along an axis, and zeros at all others; a key is any of the keys there."""
    if _is_key(array):
        source = np.zeros(size, int)
        source[list(positions)] = np.arange(len(positions))
        return jnp.take(array, source, axis)
    if stride := _stride(positions):
        padding = [(0, 0, 0)] * array.ndim
        padding[axis] = (positions[0], size - 1 - positions[-1], stride - 1)
        return lax.pad(array, jnp.zeros((), array.dtype), padding)
    full = jnp.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
    return full.at[(slice(None),) * axis + (np.asarray(positions),)].set(array)


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _put_network(n: TensorNetwork, name: str, positions: Sequence[int], size: int) -> TensorNetwork:
    """The network with zeros at all other positions."""
    put = n.map_arrays(at_index(name, lambda array, k: _put(array, k, positions, size)))
    return put if any(name in term for term in n.terms) else _masked(put, name, 1 - _outside(positions, size))


def _put_map(m: AxisMap, name: str, positions: Sequence[int], size: int) -> AxisMap:
    """The map with the identity at all other positions."""
    array, indices = m.array, m.indices
    if name not in indices:
        array, indices = jnp.broadcast_to(array, (len(positions), *array.shape)), name + indices
    identity = align_axes(jnp.asarray(_outside(positions, size), array.dtype), name, indices)
    for new, old in zip(m.new, m.old, strict=True):
        eye = jnp.eye(array.shape[indices.index(new)], dtype=array.dtype)
        identity = identity * align_axes(eye, new + old, indices)
    put = _put(array, indices.index(name), positions, size)
    return dataclasses.replace(m, array=put + identity, indices=indices)


def _outside(positions: Sequence[int], size: int) -> np.ndarray:
    """One at all other positions, zero at these."""
    outside = np.ones(size, np.float32)
    outside[list(positions)] = 0
    return outside


def _masked(n: TensorNetwork, name: str, mask: np.ndarray) -> TensorNetwork:
    """The network times a number for each entry along an index: of the smallest factor that has it, if one does."""
    having = [k for k, term in enumerate(n.terms) if name in term]
    if not having:
        return dataclasses.replace(
            n, factors=(*n.factors, jnp.asarray(mask, n.factors[0].dtype)), terms=(*n.terms, name)
        )
    k = min(having, key=lambda k: n.factors[k].size)
    factor, after = n.factors[k], len(n.terms[k]) - 1 - n.terms[k].index(name)
    masked = factor * jnp.asarray(mask, factor.dtype).reshape(-1, *[1] * after)
    return dataclasses.replace(n, factors=(*n.factors[:k], masked, *n.factors[k + 1 :]))


def _split_as(f: AdaptedWeight, like: AdaptedWeight) -> AdaptedWeight:
    """The weight with its axes split into the indices that another weight's axes have."""
    for old, new in zip(f.axes, like.axes, strict=True):
        for c in old:
            run = new[new.index(c) :]
            run = run[: next((k for k, d in enumerate(run) if k and d in old), len(run))]
            while len(run) > 1:
                before = set(f.labels)
                f = split_index(f, run[0], (like.size(run[0]), like.size(run[1:])))
                (minor,) = set(f.labels) - before
                f = rename_indices(f, {minor: run[1]}) if minor != run[1] else f
                run = run[1:]
    return f
