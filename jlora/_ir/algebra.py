"""What can be done to an adapted weight without its dense value: rename, split, merge and drop indices, join ranks.

The functions on indices change the networks and the maps alone: the result has the old `base`, and the caller
replaces it by what the program's own equation makes of it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jlora._ir.weight import AdaptedWeight, AxisMap, Index, TensorNetwork, at_index, fresh_indices


def relabel(f: AdaptedWeight, base: Any, axes: Sequence[str], indices: Iterable[Index] = ()) -> AdaptedWeight:
    """The same update with another base and other axes.

    Arguments:
        f: the weight.
        base: the new base.
        axes: the label of every axis of `base`.
        indices: those in `axes` that `f` does not have.
    """
    by_name = {index.name: index for index in (*f.indices, *indices)}
    return dataclasses.replace(f, base=base, axes=tuple(axes), indices=tuple(by_name[c] for c in "".join(axes)))


def map_index(f: AdaptedWeight, name: str, fn: Callable[[jax.Array, int], jax.Array], size: int) -> AdaptedWeight:
    """Applies `fn(array, axis)` to every factor, map and dropout key that has the index.

    Arguments:
        f: the weight; its base stays as it is. No map sums over the index: see `without_maps`.
        name: the index.
        fn: returns the new array.
        size: of the index afterwards.
    """
    if name in f.mapped:
        raise AssertionError(f"{', '.join(f.paths)}: a map sums over the index {name!r}. Use `without_maps` before.")
    return resize_index(f.map_arrays(at_index(name, fn)), name, size)


def resize_index(f: AdaptedWeight, name: str, size: int) -> AdaptedWeight:
    """The weight with another size of one index; the arrays are those of the new size already."""
    indices = tuple(index._replace(size=size) if index.name == name else index for index in f.indices)
    return dataclasses.replace(f, indices=indices)


def rename_indices(f: AdaptedWeight, names: dict[str, str]) -> AdaptedWeight:
    """Gives indices other names, those that are summed inside networks included."""
    table = str.maketrans(names)
    networks = (n.map_arrays(lambda array, term: (array, term.translate(table))) for n in f.networks)
    return dataclasses.replace(
        f,
        networks=tuple(networks),
        maps=tuple(m.rename(table) for m in f.maps),
        axes=tuple(axis.translate(table) for axis in f.axes),
        indices=tuple(index._replace(name=names.get(index.name, index.name)) for index in f.indices),
    )


def split_index(f: AdaptedWeight, name: str, sizes: tuple[int, int]) -> AdaptedWeight:
    """Splits one index in two, major first: an axis of size 12 becomes (3, 4) in every array that has it."""
    major, minor = name, fresh_indices([f.used()])
    old = f.index(name)

    def split(array: jax.Array, axis: int) -> jax.Array:
        return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])

    two = (old._replace(size=sizes[0]), Index(minor, sizes[1], old.origins))
    at_name = at_index(name, split, major + minor)
    maps, taken = [], f.used() + minor
    for m in f.maps:
        array, indices = at_name(m.array, m.indices)
        new, old_names = m.new.replace(name, major + minor), m.old
        if name in m.new:
            before = m.old[m.new.index(name)]
            taken += (second := fresh_indices([taken]))
            array, indices = at_index(before, split, before + second)(array, indices)
            old_names = old_names.replace(before, before + second)
        maps.append(AxisMap(array, indices, new, old_names))
    return dataclasses.replace(
        f,
        networks=tuple(n.map_arrays(at_name) for n in f.networks),
        maps=tuple(maps),
        axes=tuple(axis.replace(name, major + minor) for axis in f.axes),
        indices=tuple(part for index in f.indices for part in (two if index.name == name else (index,))),
    )


def drop_index(f: AdaptedWeight, name: str) -> AdaptedWeight:
    """Removes an index of size one from every array; the caller removes it from the axes."""
    squeeze = at_index(name, jnp.squeeze, "")
    maps = []
    for m in f.maps:
        array, indices = squeeze(m.array, m.indices)
        before = m.old[m.new.index(name)] if name in m.new else ""
        if before:
            array, indices = at_index(before, jnp.squeeze, "")(array, indices)
        maps.append(AxisMap(array, indices, m.new.replace(name, ""), m.old.replace(before, "")))
    return dataclasses.replace(f, networks=tuple(n.map_arrays(squeeze) for n in f.networks), maps=tuple(maps))


def merge_indices(f: AdaptedWeight) -> AdaptedWeight:
    """Labels an axis with one index if every array has all of the axis's indices or none of them.

    An axis of which some factor has a part (a Kronecker product), or along which a map sums, stays composite.

    Arguments:
        f: the weight.
    """
    for axis in f.axes:
        if len(axis) == 1 or set(axis) & set(f.mapped):
            continue
        if all(set(axis) <= set(term) or not set(axis) & set(term) for _, term in f.arrays):
            f = _merge_axis(f, axis)
    return f


def _merge_axis(f: AdaptedWeight, axis: str) -> AdaptedWeight:
    merged = axis[0]

    def merge(array: jax.Array, term: str) -> tuple[jax.Array, str]:
        if merged not in term:
            return array, term
        rest = [c for c in term if c not in axis]
        array = array.transpose([term.index(c) for c in (*axis, *rest)])
        size = math.prod(array.shape[: len(axis)])
        return array.reshape(size, *array.shape[len(axis) :]), merged + "".join(rest)

    origins = tuple(dict.fromkeys(origin for c in axis for origin in f.index(c).origins))
    axes = [merged if a == axis else a for a in f.axes]
    return relabel(f.map_arrays(merge), f.base, axes, [Index(merged, f.size(axis), origins)])


def take_picks(f: AdaptedWeight) -> AdaptedWeight:
    """The weight with the picked entries of its factors in the place of the factors, as wide as the weight."""

    def take(n: TensorNetwork) -> TensorNetwork:
        if not n.picks:
            return n
        factors, terms = list(n.factors), list(n.terms)
        # The last position first: that of a loop is one for all rows, and its gradient is added in place.
        for position, name in zip(n.picks[::-1], n.picked[::-1], strict=True):
            for k, (array, term) in enumerate(zip(factors, terms, strict=True)):
                if name in term:
                    factors[k] = lax.dynamic_index_in_dim(array, position, term.index(name), keepdims=False)
                    terms[k] = term.replace(name, "")
        factors = tuple(widened(array, f.dtype) for array in factors)
        return dataclasses.replace(n, factors=factors, terms=tuple(terms), picks=(), picked="", pick_terms=())

    return dataclasses.replace(f, networks=tuple(map(take, f.networks))) if any(n.picks for n in f.networks) else f


def pick_along(f: AdaptedWeight, name: str) -> AdaptedWeight:
    """The weight in whose factors with picks an index is replaced by one more position, which is its own number there.

    A loop along the index then slices the positions, and not the factors.
    """
    if not any(n.picks for n in f.networks):
        return f
    new = fresh_indices([f.used()])

    def pick(n: TensorNetwork) -> TensorNetwork:
        if not n.picks or not any(name in term for term in n.terms):
            return n
        numbers, terms = jnp.arange(f.size(name)), tuple(term.replace(name, new) for term in n.terms)
        picks, pick_terms = (*n.picks, numbers), (*n.pick_terms, name)
        return dataclasses.replace(n, terms=terms, picks=picks, picked=n.picked + new, pick_terms=pick_terms)

    return dataclasses.replace(f, networks=tuple(map(pick, f.networks)))


def widened(array: Any, dtype: DTypeLike) -> Any:
    """The array, in this dtype if its own is a narrower floating-point one."""
    is_narrow = jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < jnp.finfo(dtype).bits
    return array.astype(dtype) if is_narrow else array


def concatenate_ranks(f: AdaptedWeight) -> AdaptedWeight:
    """Joins low-rank products of one form into one whose rank is the sum: two matrices in all, not two for each.

    Products of two factors with one rank between them and no dropout are joined if their terms and dtypes agree.
    """
    joined: dict[Any, TensorNetwork] = {}
    for number, network in enumerate(f.networks):
        ranks = set("".join(network.terms)) - set(f.labels)
        rank = "".join(ranks)
        joins = (
            len(ranks) == 1
            and len(network.terms) == 2
            and all(rank in term for term in network.terms)
            and network.key is None
        )
        dtypes = tuple(factor.dtype for factor in network.factors)
        form = (*(term.replace(rank, "?") for term in network.terms), *dtypes) if joins else number
        joined[form] = _concatenate_pair(joined[form], network, rank) if form in joined else network
    return dataclasses.replace(f, networks=tuple(joined.values()))


def _concatenate_pair(first: TensorNetwork, second: TensorNetwork, rank: str) -> TensorNetwork:
    (a, c), (b, d) = ((n.factors[0] * jnp.asarray(n.scale, n.factors[0].dtype), n.factors[1]) for n in (first, second))
    a_axis, c_axis = (term.index(rank) for term in second.terms)
    factors = jnp.concatenate([a, b], axis=a_axis), jnp.concatenate([c, d], axis=c_axis)
    return dataclasses.replace(first, factors=factors, scale=1.0)


def barrier(values: Sequence[Any]) -> list[Any]:
    """`jax.lax.optimization_barrier` for arrays and weights.

    Bases have barriers of their own: an operand without a tangent gets one if it shares a barrier with an operand that
    has one, and a base with a tangent makes the backward pass compute the gradient of the whole weight.
    """
    bases = iter([lax.optimization_barrier(v.base) for v in values if isinstance(v, AdaptedWeight)])
    rest = lax.optimization_barrier([(v.networks, v.maps) if isinstance(v, AdaptedWeight) else v for v in values])
    return [
        dataclasses.replace(v, base=next(bases), networks=r[0], maps=r[1]) if isinstance(v, AdaptedWeight) else r
        for v, r in zip(values, rest, strict=True)
    ]


def align_axes(x: jax.Array, term: str, out: str) -> jax.Array:
    """Transposes `x` to the order of `out`, with axes of size one for the indices that `x` lacks."""
    order = [term.index(c) for c in out if c in term]
    if order != sorted(order):
        x = x.transpose(order)
    missing = [k for k, c in enumerate(out) if c not in term]
    return jnp.expand_dims(x, missing) if missing else x
