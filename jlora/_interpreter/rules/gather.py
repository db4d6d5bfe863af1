"""Lookups of rows at positions that an array holds: `gather` (indexing, `take`, embeddings)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.lookup import finish_lookup, mark_gathered
from jlora._interpreter.rules.registry import register_rule
from jlora._interpreter.rules.slicing import spread_multipliers
from jlora._ir import lazy
from jlora._ir.algebra import merge_indices, relabel
from jlora._ir.materialize import without_maps, without_maps_along
from jlora._ir.sizes import is_wide
from jlora._ir.structured import structured, with_matrices
from jlora._ir.weight import AdaptedWeight, Index, TensorNetwork, fresh_indices
from jlora._ops.draws import refuse_latent


@register_rule("gather")
def gather(ctx: Context, eqn: Eqn, f: Value, positions: Value) -> list[Value] | None:
    """Looks up the rows of every array that has the index of an axis that is looked up."""
    if not isinstance(f, AdaptedWeight) or isinstance(positions, AdaptedWeight):
        return None
    matrices, f = structured(f), with_matrices(f)
    lookup = _Lookup(f, eqn, positions)
    changed = without_maps(f) if lookup.is_filled_matrix else without_maps_along(f, lookup.cut_axes)
    factored, lookup = changed is f, _Lookup(merge_indices(changed), eqn, positions)
    if not lookup.is_supported:
        return None
    f = lookup.f
    indexed, batched = ([f.axes[k] for k in axes] for axes in (lookup.indexed_axes, lookup.batching_axes))
    rows = _look_up_weight(lookup)
    in_bounds = (_in_bounds(lookup), lookup.batch_term) if lookup.fills and (f.networks or f.mapped) else None
    value = finish_lookup(ctx, eqn, f, rows, indexed, batched, in_bounds, matrices, factored=factored)
    if isinstance(value, AdaptedWeight) and not lookup.is_single:
        return [mark_gathered(value, f, indexed)]
    return [value]


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A `gather` from a weight.

    Arguments:
        f: the weight.
        eqn: the equation.
        positions: its integer operand, whose last axis holds one position for each axis in `start_index_map`.
    """

    f: AdaptedWeight
    eqn: Eqn
    positions: jax.Array

    @property
    def numbers(self) -> lax.GatherDimensionNumbers:
        return self.eqn.params["dimension_numbers"]

    @property
    def slice_sizes(self) -> tuple[int, ...]:
        return self.eqn.params["slice_sizes"]

    @property
    def mode(self) -> Any:
        return self.eqn.params["mode"]

    @property
    def fills(self) -> bool:
        """Whether rows out of bounds are filled; then even the position of a whole axis may be out of bounds."""
        return self.mode == lax.GatherScatterMode.FILL_OR_DROP

    @property
    def is_single(self) -> bool:
        """Whether one row is looked up, as for a layer of a stack. Several rows are a lookup in a table."""
        return math.prod(self.positions.shape[:-1]) == 1

    def axis_of(self, name: str) -> int | None:
        """The weight's axis that an index labels, None for an index that is summed inside a network."""
        return next((k for k, axis in enumerate(self.f.axes) if name in axis), None)

    @property
    def batching_axes(self) -> tuple[int, ...]:
        return tuple(self.numbers.operand_batching_dims)

    @property
    def removed_axes(self) -> tuple[int, ...]:
        """The weight's axes that the result lacks."""
        return *self.numbers.collapsed_slice_dims, *self.batching_axes

    @property
    def window_axes(self) -> list[int]:
        """The weight's axes that the result has."""
        return [k for k in range(len(self.f.shape)) if k not in self.removed_axes]

    @property
    def narrowed_axes(self) -> list[int]:
        """The weight's axes of which the result has a part."""
        return [k for k, n in enumerate(self.f.shape) if self.slice_sizes[k] != n]

    @property
    def indexed_axes(self) -> list[int]:
        """The weight's axes that positions choose from."""
        chosen = {*self.narrowed_axes, *self.removed_axes}
        return [k for k in self.numbers.start_index_map if k in chosen]

    @property
    def moved_axes(self) -> tuple[int, ...]:
        """The weight's axes along which a row may be out of bounds, or differs from row to row."""
        return *(self.numbers.start_index_map if self.fills else self.indexed_axes), *self.batching_axes

    @property
    def plain_axes(self) -> set[int]:
        """The weight's axes with one index."""
        return {k for k, axis in enumerate(self.f.axes) if len(axis) == 1}

    @property
    def composite_axes(self) -> set[int]:
        """The weight's composite axes that are looked up one entry at a time, each index by a position of its own."""
        return set(self.numbers.collapsed_slice_dims) & set(self.numbers.start_index_map) - self.plain_axes

    @property
    def cut_axes(self) -> set[int]:
        """The weight's axes of which the result has a part, or another part in every row."""
        return {*self.narrowed_axes, *self.moved_axes, *self.removed_axes}

    @property
    def is_filled_matrix(self) -> bool:
        """Whether the result is a weight, some of whose rows may be filled."""
        return self.fills and sum(is_wide(self.slice_sizes[k]) for k in self.window_axes) > 1

    @property
    def is_supported(self) -> bool:
        """Whether the rows of each factor are rows of the weight, and a filled row has an update of zero."""
        if not self.cut_axes <= self.plain_axes | self.composite_axes:
            return False
        if not self.fills:
            return True
        # A weight that stays a weight can express what was filled by zeros in a factor alone.
        moved = {self.f.axes[k] for k in self.moved_axes}
        if self.is_filled_matrix and not all(_has_all(n, moved) for n in self.f.networks):
            return False
        return not (self.composite_axes and (self.is_filled_matrix or self.f.maps))

    @functools.cached_property
    def batch_term(self) -> str:
        """New indices for the axes of the positions but the last."""
        return fresh_indices([self.f.used()], self.positions.ndim - 1)


def _has_all(network: TensorNetwork, names: set[str]) -> bool:
    """Whether every index is in some term, so that a position out of bounds can yield a zero there."""
    return all(any(name in term for term in network.terms) for name in names)


def _look_up_weight(lookup: _Lookup) -> AdaptedWeight:
    """The rows of the base and of every other array, as a weight."""
    f, batch_term = lookup.f, lookup.batch_term
    at = _positions_by_index(lookup)
    maps = f.maps
    if lookup.fills:  # filled rows are not multiplied: the multipliers need to know them
        moved = {name: f.size(name) for name in (f.axes[k] for k in lookup.moved_axes)}
        maps = tuple(m if m.new else spread_multipliers(m, moved) for m in maps)
    rows = dataclasses.replace(
        f,
        networks=tuple(_look_up_network(n, lookup, at) for n in f.networks),
        maps=tuple(m.map_arrays(functools.partial(_look_up_array, lookup=lookup, at=at, fill=1)) for m in maps),
    )
    batch = [Index(c, n) for c, n in zip(batch_term, lookup.positions.shape[:-1], strict=True)]
    window = [
        f.index(f.axes[k])._replace(size=lookup.slice_sizes[k]) for k in lookup.window_axes if k in lookup.plain_axes
    ]
    axes = _place_axes([f.axes[k] for k in lookup.window_axes], batch_term, lookup.numbers.offset_dims)
    return relabel(rows, _look_up_base(lookup), axes, (*batch, *window))


def _look_up_base(lookup: _Lookup) -> Any:
    """The base's rows. Of a quantised table only these are materialised."""
    f, eqn = lookup.f, lookup.eqn
    if isinstance(f.base, lazy.LazyArray) and _is_row_lookup(lookup):
        at = _widen(lookup.positions[..., 0])
        rows = lazy.gather_rows(f.base, jnp.clip(at, 0, f.base.shape[0] - 1))
        if rows is not None:
            return _fill_rows(rows, lookup) if lookup.fills else rows
    return (lazy.bind if lookup.is_single else lazy.consume)(eqn, f.base, lookup.positions)[0]


def _is_row_lookup(lookup: _Lookup) -> bool:
    """Whether whole entries of the first axis are looked up, and are not a single matrix, which stays a weight."""
    numbers, positions, shape = lookup.numbers, lookup.positions, lookup.f.shape
    trailing = tuple(range(positions.ndim - 1, positions.ndim + len(shape) - 2))
    by_first_axis = (numbers.start_index_map, numbers.collapsed_slice_dims) == ((0,), (0,))
    return (
        by_first_axis
        and tuple(numbers.offset_dims) == trailing
        and tuple(lookup.slice_sizes[1:]) == tuple(shape[1:])
        and not (lookup.is_single and len(shape) > 2)
    )


def _fill_rows(rows: jax.Array, lookup: _Lookup) -> jax.Array:
    mask = _in_bounds(lookup)
    fill_value = lookup.eqn.params["fill_value"]
    fill = jnp.asarray(jnp.nan if fill_value is None else fill_value, rows.dtype)
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (rows.ndim - mask.ndim)), rows, fill)


def _in_bounds(lookup: _Lookup) -> jax.Array:
    """Which rows are within bounds."""
    positions = _widen(lookup.positions)
    last = [lookup.f.shape[k] - lookup.slice_sizes[k] for k in lookup.numbers.start_index_map]
    bounds = jnp.array(last, positions.dtype).reshape([1] * (positions.ndim - 1) + [-1])
    return ((positions >= 0) & (positions <= bounds)).all(axis=-1)


def _widen(positions: jax.Array) -> jax.Array:
    """Positions in a type that can hold the bounds, which narrow integers may not."""
    return positions.astype(jnp.int32) if positions.dtype.itemsize < 4 else positions


def _positions_by_index(lookup: _Lookup) -> dict[str, jax.Array]:
    """For every index that is looked up its positions. Those of a composite axis are divided among its indices."""
    f, at = lookup.f, {}
    for j, k in enumerate(lookup.numbers.start_index_map):
        if k in lookup.plain_axes:
            at[f.axes[k]] = lookup.positions[..., j]
        elif k in lookup.composite_axes:
            flat = lookup.positions[..., j].astype(jnp.int32)
            clips = lookup.mode == lax.GatherScatterMode.CLIP
            flat = jnp.clip(flat, 0, f.shape[k] - 1) if clips else flat
            for name in reversed(f.axes[k]):
                at[name], flat = flat % f.size(name), flat // f.size(name)
    return at


def _look_up_network(n: TensorNetwork, lookup: _Lookup, at: dict[str, jax.Array]) -> TensorNetwork:
    """The same rows of every factor that has them; rows out of bounds are zero."""
    refuse_latent(n, "a lookup")
    pairs = [_look_up_array(a, t, lookup, at, fill=0) for a, t in zip(n.factors, n.terms, strict=True)]
    key = None if n.key is None else n.key.reshape(-1)[0]  # one for all rows: each has an input of its own
    factors, terms = tuple(a for a, _ in pairs), tuple(t for _, t in pairs)
    return dataclasses.replace(n, factors=factors, terms=terms, key=key, key_term="")


def _look_up_array(
    array: jax.Array, term: str, lookup: _Lookup, at: dict[str, jax.Array], *, fill: int
) -> tuple[jax.Array, str]:
    """The rows of one array and their labels: those of the array's own axes if none of them is looked up.

    Arguments:
        array, term: the array and the indices of its axes.
        lookup: the lookup.
        at: the positions of each index that is looked up.
        fill: the value of rows out of bounds.
    """
    axes = [lookup.axis_of(name) for name in term]
    sizes = [_slice_size(lookup, k, n) for k, n in zip(axes, array.shape, strict=True)]
    collapsed = tuple(j for j, k in enumerate(axes) if k in lookup.numbers.collapsed_slice_dims)
    batching = _batching_pairs(lookup, axes)
    windows = [j for j in range(len(term)) if j not in (*collapsed, *(axis for axis, _ in batching))]
    window_term = "".join(term[j] for j in windows)
    looked_up = [name for name in at if name in term]
    if not looked_up and not batching:  # no position moves this window: it is at the start
        return lax.squeeze(lax.slice(array, [0] * array.ndim, sizes), collapsed), window_term
    batch_ndim = len(lookup.batch_term)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(batch_ndim, batch_ndim + len(windows))),
        collapsed_slice_dims=collapsed,
        start_index_map=tuple(map(term.index, looked_up)),
        operand_batching_dims=tuple(axis for axis, _ in batching),
        start_indices_batching_dims=tuple(axis for _, axis in batching),
    )
    positions = jnp.stack([at[name] for name in looked_up], axis=-1) if looked_up else lookup.positions[..., :0]
    rows = lax.gather(array, positions, numbers, tuple(sizes), mode=lookup.mode, fill_value=fill)
    return rows, lookup.batch_term + window_term


def _slice_size(lookup: _Lookup, axis: int | None, size: int) -> int:
    """How much of an array's axis a row has: all of a rank, and of one index of a composite axis that is kept."""
    is_kept_part = axis in lookup.window_axes and axis not in lookup.plain_axes
    return size if axis is None or is_kept_part else lookup.slice_sizes[axis]


def _batching_pairs(lookup: _Lookup, axes: Sequence[int | None]) -> list[tuple[int, int]]:
    """The axes of an array that the lookup runs along, each with the axis of the positions that does."""
    pairs = zip(lookup.batching_axes, lookup.numbers.start_indices_batching_dims, strict=True)
    return sorted((axes.index(k), s) for k, s in pairs if k in axes)


def _place_axes(windows: Sequence[str], batch: Sequence[str], offset_dims: Sequence[int]) -> list[str]:
    """The labels of a gather's result: windows at the offset dimensions, the positions' axes elsewhere."""
    window, position = iter(windows), iter(batch)
    return [next(window) if k in offset_dims else next(position) for k in range(len(windows) + len(batch))]
