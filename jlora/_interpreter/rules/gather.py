"""Reading rows of a weight: `gather` (indexing, `take`, embeddings) and `dynamic_slice`."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.context import Context, Role, Value
from jlora._ir import lazy as _deferred
from jlora._ir.algebra import align_axes, map_index, merge_indices, relabel
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.weight import AdaptedWeight, AxisScale, Index, TensorNetwork, fresh_indices
from jlora._ops import contraction as _contract


def gather(ctx: Context, eqn: Any, f: Value, indices: Value) -> list[Value] | None:
    if not isinstance(f, AdaptedWeight) or isinstance(indices, AdaptedWeight):
        return None
    p, d = eqn.params, eqn.params["dimension_numbers"]
    f = merge_indices(f)
    taken = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    windows = [k for k in range(len(f.shape)) if k not in taken]
    cut = [k for k in range(len(f.shape)) if p["slice_sizes"][k] < f.shape[k]]
    indexed = [k for k in d.start_index_map if k in cut or k in taken]
    fills = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP  # then even the index of a whole axis may be out of bounds
    touched = (*(d.start_index_map if fills else indexed), *d.operand_batching_dims)
    single = {k for k in range(len(f.shape)) if len(f.axes[k]) == 1}
    rows = {
        k for k in d.collapsed_slice_dims if k in d.start_index_map
    } - single  # looked up one by one, letter by letter
    if not {*cut, *touched, *taken} <= single | rows:
        return None
    stays = sum(p["slice_sizes"][k] > 1 for k in windows) > 1  # a weight still, in which only zeros say what was filled
    carried = all(_carries(n, {f.axes[k] for k in touched}) for n in f.networks)
    if fills and ((stays and not carried) or (rows and (stays or f.axis_scales))):
        return None
    if fills:  # what is filled has no gain: each has to know where
        f = _with_letters(f, [f.axes[k] for k in touched])
    alone = math.prod(indices.shape[:-1]) == 1  # one row is a layer, several are a lookup
    base = _looked_up(f, eqn, indices, alone)
    starts = _starts(f, eqn, indices)

    new = fresh_indices([f.used()], indices.ndim - 1)
    batch = [Index(c, n) for c, n in zip(new, indices.shape[:-1], strict=True)]
    window = {k: f.axes[k] for k in windows}
    networks = tuple(_gathered(n, f, eqn, starts, indices, "".join(new)) for n in f.networks)
    gains = tuple(
        AxisScale(*_rows(s.vector, s.indices, f, eqn, starts, indices, "".join(new), fill=1)) for s in f.axis_scales
    )
    axes = _place([window[k] for k in windows], [x.name for x in batch], d.offset_dims)
    letters = [
        x._replace(size=p["slice_sizes"][k])
        for k in windows
        for x in f.indices
        if x.name in f.axes[k] and len(f.axes[k]) == 1
    ]
    out = relabel(dataclasses.replace(f, networks=networks, axis_scales=gains), base, axes, (*batch, *letters))
    inside = (_inside(f, eqn, indices), new) if fills and f.networks else None
    looked = [c for k in indexed for c in f.axes[k]]
    value = read(ctx, eqn, f, out, looked, [f.axes[k] for k in d.operand_batching_dims], inside=inside)
    if isinstance(value, AdaptedWeight) and not alone:
        origins = dict.fromkeys(o for c in looked for o in f.index(c).origins)
        value = dataclasses.replace(value, gathered_axes=(*value.gathered_axes, *origins))
    return [value]


def _looked_up(f: AdaptedWeight, eqn: Any, indices: jax.Array, alone: bool) -> Any:
    """The base's rows. Of a quantised table only these are made."""
    p, d = eqn.params, eqn.params["dimension_numbers"]
    last = tuple(range(indices.ndim - 1, indices.ndim + len(f.shape) - 2))
    first = (d.start_index_map, d.collapsed_slice_dims, d.offset_dims) == ((0,), (0,), last)
    whole = tuple(p["slice_sizes"][1:]) == tuple(f.shape[1:])
    if isinstance(f.base, _deferred.LazyArray) and first and whole and not (alone and len(f.shape) > 2):
        at = indices[..., 0]
        at = at.astype(jnp.int32) if at.dtype.itemsize < 4 else at  # the bounds may not fit narrow ones
        found = _deferred.gather_rows(f.base, jnp.clip(at, 0, f.base.shape[0] - 1))
        if found is not None and p["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            inside = _inside(f, eqn, indices).reshape(*indices.shape[:-1], *(1,) * (len(f.shape) - 1))
            fill = jnp.nan if p["fill_value"] is None else p["fill_value"]
            return jnp.where(inside, found, jnp.asarray(fill, found.dtype))
        if found is not None:
            return found
    return (_deferred.bind if alone else _deferred.consume)(eqn, f.base, indices)[0]


def _inside(f: AdaptedWeight, eqn: Any, indices: jax.Array) -> jax.Array:
    """Which rows lie within bounds."""
    index_map, sizes = list(eqn.params["dimension_numbers"].start_index_map), eqn.params["slice_sizes"]
    indices = indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices  # the bounds may not fit narrow ones
    last = jnp.array([f.shape[k] - sizes[k] for k in index_map], indices.dtype)
    return ((indices >= 0) & (indices <= last.reshape([1] * (indices.ndim - 1) + [-1]))).all(axis=-1)


def _starts(f: AdaptedWeight, eqn: Any, indices: jax.Array) -> dict[str, jax.Array]:
    """For every letter that is looked up, where: an axis of several letters has an index for each."""
    p, d, starts = eqn.params, eqn.params["dimension_numbers"], {}
    for j, k in enumerate(d.start_index_map):
        at = indices[..., j]
        if len(f.axes[k]) == 1:
            starts[f.axes[k]] = at
        elif k in d.collapsed_slice_dims:
            at = at.astype(jnp.int32)
            at = jnp.clip(at, 0, f.shape[k] - 1) if p["mode"] == lax.GatherScatterMode.CLIP else at
            for c in reversed(f.axes[k]):
                starts[c], at = at % f.index(c).size, at // f.index(c).size
    return starts


def _carries(network: TensorNetwork, names: set[str]) -> bool:
    """Whether every letter stands in a term, so that an index out of bounds can put a zero there."""
    return all(any(name in t for t in network.terms) for name in names)


def _with_letters(f: AdaptedWeight, names: list[str]) -> AdaptedWeight:
    """The same weight, every gain with an axis for every one of the letters."""

    def spread(scale: AxisScale) -> AxisScale:
        new = "".join(c for c in names if c not in scale.indices)
        vector = jnp.broadcast_to(scale.vector, (*(f.index(c).size for c in new), *scale.vector.shape))
        return AxisScale(vector, new + scale.indices)

    return dataclasses.replace(f, axis_scales=tuple(map(spread, f.axis_scales)))


def _gathered(
    n: TensorNetwork,
    f: AdaptedWeight,
    eqn: Any,
    starts: dict[str, jax.Array],
    indices: jax.Array,
    batch: str,
) -> TensorNetwork:
    """The same rows of every factor that has them; rows out of bounds are filled, as the base decides their value."""
    pairs = [_rows(a, t, f, eqn, starts, indices, batch, fill=0) for a, t in zip(n.factors, n.terms, strict=True)]
    key = None if n.key is None else n.key.reshape(-1)[0]  # one serves all rows: their inputs are drawn apart
    return dataclasses.replace(
        n, factors=tuple(a for a, _ in pairs), terms=tuple(t for _, t in pairs), key=key, key_term=""
    )


def _rows(
    factor: jax.Array,
    term: str,
    f: AdaptedWeight,
    eqn: Any,
    starts: dict[str, jax.Array],
    indices: jax.Array,
    batch: str,
    fill: int,
) -> tuple[jax.Array, str]:
    p, d = eqn.params, eqn.params["dimension_numbers"]
    axis = {c: k for k, letters in enumerate(f.axes) for c in letters}
    dims = [axis.get(c) for c in term]  # for every axis of the factor, the weight's axis
    columns = [c for c in starts if c in term]
    collapsed = tuple(j for j, k in enumerate(dims) if k in d.collapsed_slice_dims)
    batching = [
        (dims.index(k), s)
        for k, s in zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True)
        if k in dims
    ]
    batching.sort()
    whole = [k is None or (len(f.axes[k]) > 1 and k not in d.collapsed_slice_dims) for k in dims]
    sizes = [factor.shape[j] if whole[j] else p["slice_sizes"][k] for j, k in enumerate(dims)]
    if not columns and not batching:  # a window that no index moves lies at the start
        first = lax.slice(factor, [0] * factor.ndim, sizes)
        return lax.squeeze(first, collapsed), "".join(c for j, c in enumerate(term) if j not in collapsed)
    windows = [j for j in range(len(term)) if j not in collapsed and j not in [b for b, _ in batching]]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(batch), len(batch) + len(windows))),
        collapsed_slice_dims=collapsed,
        start_index_map=tuple(term.index(c) for c in columns),
        operand_batching_dims=tuple(b for b, _ in batching),
        start_indices_batching_dims=tuple(s for _, s in batching),
    )
    picked = jnp.stack([starts[c] for c in columns], axis=-1) if columns else indices[..., :0]
    rows = lax.gather(factor, picked, numbers, tuple(sizes), mode=p["mode"], fill_value=fill)
    return rows, batch + "".join(term[j] for j in windows)


def _place(windows: list[str], batch: list[str], offsets: tuple[int, ...]) -> list[str]:
    """The axes of a gather's result: windows at the offset dimensions, indices elsewhere."""
    window, index = iter(windows), iter(batch)
    return [next(window) if k in offsets else next(index) for k in range(len(windows) + len(batch))]


def dynamic_slice(ctx: Context, eqn: Any, f: Value, *starts: Value) -> list[Value] | None:
    if not isinstance(f, AdaptedWeight) or any(isinstance(s, AdaptedWeight) for s in starts):
        return None
    f = merge_indices(f)
    sizes = eqn.params["slice_sizes"]
    cut = [k for k in range(len(sizes)) if sizes[k] != f.shape[k]]
    if any(len(f.axes[k]) > 1 for k in cut):
        return None
    (base,) = _deferred.bind(eqn, f.base, *starts)
    out = f
    for k in cut:
        out = map_index(
            out, f.axes[k], lambda a, axis, k=k: lax.dynamic_slice_in_dim(a, starts[k], sizes[k], axis), sizes[k]
        )
    return [read(ctx, eqn, f, relabel(out, base, f.axes), [f.axes[k] for k in cut if sizes[k] == 1], [])]


def read(
    ctx: Context,
    eqn: Any,
    f: AdaptedWeight,
    out: AdaptedWeight,
    indexed: list[str],
    stacked: list[str],
    inside: tuple[jax.Array, str] | None = None,
) -> Value:
    """Rows that were read: vectors are a lookup, and so an activation; matrices are still a weight.

    Arguments:
        ctx, eqn: the lookup.
        f: the weight.
        out: the rows.
        indexed, stacked: the letters along which rows were looked up, and along which the lookup runs.
        inside: which rows lie within bounds, and the letters of its axes. The others are filled, with not-a-number as a
            rule: their cotangent may be none either, and must not reach the factors.
    """
    left = [axis for axis in out.axes if any(x.size > 1 and x.origins for x in out.indices if x.name in axis)]
    if not indexed or len(left) > 1:
        return out
    roles: dict[str, Role] = {x.name: "out" for x in f.indices}
    roles.update({**dict.fromkeys(indexed, "in"), **dict.fromkeys(stacked, "stack")})
    ctx.record(eqn, f, roles, added=2 * sum(out.base.size * a.shape[-1] for n in out.networks for a in n.factors[:1]))
    return under_auto_axes(functools.partial(_value, within_indices=inside[1] if inside else ""), out.base)(
        out, inside and inside[0]
    )


def _value(out: AdaptedWeight, inside: jax.Array | None, *, within_indices: str) -> jax.Array:
    """The rows, with what the networks add to those within bounds."""
    spelled = "".join(out.axes)
    value = _contract.apply_axis_scales(
        _deferred.materialize(out.base), spelled, {x.name: x.size for x in out.indices}, out.axis_scales
    )
    for n in out.networks:
        order = sorted(range(len(n.terms)), key=lambda k: not any(c in n.terms[k] for c in _new(out)))
        n = dataclasses.replace(n, factors=tuple(n.factors[k] for k in order), terms=tuple(n.terms[k] for k in order))
        head, rest = n.factors[0], TensorNetwork(n.factors[1:], n.terms[1:], n.scale)
        if not rest.factors:
            head = head * jnp.asarray(n.scale, head.dtype)
        head = _contract.name_intermediate(head.astype(value.dtype))
        y = _contract.apply_network(head, n.terms[0], rest, spelled, dtype=value.dtype)
        y = jnp.broadcast_to(y, [out.size(c) for c in spelled])
        if inside is not None:
            y = jnp.where(align_axes(inside, within_indices, spelled), y, jnp.zeros((), y.dtype))
        value = value + y.reshape(value.shape)
    return value


def _new(f: AdaptedWeight) -> set[str]:
    return {x.name for x in f.indices if not x.origins}


RULES = {"gather": gather, "dynamic_slice": dynamic_slice}
