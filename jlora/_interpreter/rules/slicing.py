"""Parts of a weight, and weights with a margin: `slice`, `split`, `pad`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.algebra import map_index, merge_indices, resize_index
from jlora._ir.materialize import without_maps_along
from jlora._ir.weight import AdaptedWeight, AxisMap, TensorNetwork, at_index

Bounds = tuple[int, int, int]  # start, limit and stride along one axis


@register_rule("slice")
def slice_(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value] | None:
    """Slices every array that has the index of an axis that is sliced."""
    p = eqn.params
    strides = p["strides"] or [1] * len(f.axes)
    part = _slice_axes(f, list(zip(p["start_indices"], p["limit_indices"], strides, strict=True)))
    return None if part is None else [dataclasses.replace(part, base=lazy.bind(eqn, f.base)[0])]


@register_rule("split")
def split(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value] | None:
    """Slices every array that has the index of the axis, once for each part."""
    axis, start, parts = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        bounds = [(start, start + size, 1) if k == axis else (0, n, 1) for k, n in enumerate(f.shape)]
        parts.append(_slice_axes(f, bounds))
        start += size
    if any(part is None for part in parts):
        return None
    return [dataclasses.replace(part, base=base) for part, base in zip(parts, lazy.bind(eqn, f.base), strict=True)]


def _slice_axes(f: AdaptedWeight, bounds: Sequence[Bounds]) -> AdaptedWeight | None:
    """The update of a part of the weight, with the old base. A composite axis can be cut between blocks of its minor
    indices only.
    """
    cut_axes = [k for k, bound in enumerate(bounds) if bound != (0, f.shape[k], 1)]
    f = merge_indices(without_maps_along(f, cut_axes))
    for k, (start, limit, stride) in enumerate(bounds):
        if (start, limit, stride) == (0, f.shape[k], 1):
            continue
        major, block = f.axes[k][0], f.size(f.axes[k][1:])
        if start % block or limit % block or (block > 1 and stride != 1):
            return None
        start, limit = start // block, limit // block
        cut = functools.partial(_slice_array, start=start, limit=limit, stride=stride)
        f = map_index(f, major, cut, len(range(start, limit, stride)))
    return f


def _slice_array(a: jax.Array, axis: int, *, start: int, limit: int, stride: int) -> jax.Array:
    return lax.slice_in_dim(a, start, limit, stride, axis)


@register_rule("pad")
def pad(ctx: Context, eqn: Eqn, f: Value, value: Value) -> list[Value] | None:
    """Pads the base with the program's value, and the update with zeros."""
    if not isinstance(f, AdaptedWeight) or isinstance(value, AdaptedWeight):
        return None
    (base,) = lazy.bind(eqn, f.base, value)
    f = merge_indices(f)
    for k, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            if len(f.axes[k]) > 1:
                return None
            f = pad_index(f, f.axes[k], config, base.shape[k])
    return [dataclasses.replace(f, base=base)]


def pad_index(f: AdaptedWeight, name: str, config: tuple[int, int, int], size: int) -> AdaptedWeight:
    """Pads networks with zeros and multipliers with ones along an index.

    Arguments:
        f: the weight; none of its maps sums over indices.
        name: the index. Networks and multipliers that are constant along it get an axis for it, so that they end at
            the padding.
        config: of the padding, as for `jax.lax.pad`.
        size: the size of the index afterwards.
    """
    old_size = f.index(name).size
    networks = tuple(_spread_network(n, name, old_size).map(name, _padding(0, config)) for n in f.networks)
    maps = [spread_multipliers(m, {name: old_size}) for m in f.maps]
    maps = tuple(m.map_arrays(at_index(name, _padding(1, config))) for m in maps)
    return resize_index(dataclasses.replace(f, networks=networks, maps=maps), name, size)


def _spread_network(n: TensorNetwork, name: str, size: int) -> TensorNetwork:
    """The network with the index in at least one of its factors."""
    if any(name in term for term in n.terms):
        return n
    return dataclasses.replace(n, factors=(*n.factors, jnp.ones(size, n.factors[0].dtype)), terms=(*n.terms, name))


def spread_multipliers(m: AxisMap, sizes: dict[str, int]) -> AxisMap:
    """The map with an axis for each of the indices; `sizes` holds their sizes by name."""
    new = [name for name in sizes if name not in m.indices]
    array = jnp.broadcast_to(m.array, (*(sizes[name] for name in new), *m.array.shape))
    return dataclasses.replace(m, array=array, indices="".join(new) + m.indices)


def _padding(value: int, config: tuple[int, int, int]) -> Any:
    def pad_array(a: jax.Array, axis: int) -> jax.Array:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        return lax.pad(a, jnp.asarray(value, a.dtype), [config if k == axis else (0, 0, 0) for k in range(a.ndim)])

    return pad_array
