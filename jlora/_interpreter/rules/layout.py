"""What programs do to a weight before they use it: cast, move, transpose, reshape, broadcast, reverse, all-gather."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.algebra import barrier, drop_index, map_index, merge_indices, relabel, split_index
from jlora._ir.partition import shardings_like
from jlora._ir.weight import AdaptedWeight, Index, fresh_indices


@register_rule("copy", "copy_p", "sharding_constraint", "layout_constraint", "name", "pvary", "pcast")
def identity(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Applies the equation to the base alone: it changes neither the shape nor the meaning of the weight."""
    return [dataclasses.replace(f, base=lazy.bind(eqn, f.base)[0])]


@register_rule("convert_element_type")
def convert_element_type(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value] | None:
    """Casts the base. Factors keep their dtype: they are cast to the activation's when they are used.

    A cast to fewer than 16 bits rounds so much that base and update have to be rounded together: it materialises.
    """
    dtype = eqn.params["new_dtype"]
    is_fine = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    return identity(ctx, eqn, f) if is_fine else None


@register_rule("reduce_precision")
def reduce_precision(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value] | None:
    """Rounds the base, if the result is at least as precise as bfloat16; see `convert_element_type`."""
    is_fine = eqn.params["exponent_bits"] >= 5 and eqn.params["mantissa_bits"] >= 7
    return identity(ctx, eqn, f) if is_fine else None


@register_rule("stop_gradient")
def stop_gradient(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Stops the factors' gradients too, as it would stop those of the merged weight."""
    return [jax.tree.map(lax.stop_gradient, f)]


@register_rule("optimization_barrier")
def optimization_barrier(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Puts bases, and all other arrays, behind barriers."""
    return barrier(values)


@register_rule("reshard")
def reshard(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Reshards the factors, and the parts of a quantised base, with the weight: each index as the axis it labels."""
    sharding = eqn.params["dst_sharding"]
    base = lazy.reshard(f.base, sharding) if isinstance(f.base, lazy.LazyArray) else None
    if base is None:
        (base,) = lazy.consume(eqn, lazy.materialize(f.base))
        sharding = jax.typeof(base).sharding
    others = dataclasses.replace(f, base=None), dataclasses.replace(shardings_like(f, sharding), base=None)
    return [dataclasses.replace(jax.sharding.reshard(*others), base=base)]


@register_rule("device_put")
def device_put(ctx: Context, eqn: Eqn, *values: Value) -> list[Value] | None:
    """Moves the factors too if the target is a kind of memory. A sharding is that of the weight's shape, and applies to
    the base alone.
    """
    bases = [v.base if isinstance(v, AdaptedWeight) else v for v in values]
    if len(values) > 1 and any(isinstance(base, lazy.LazyArray) for base in bases):
        return None
    results = zip(values, lazy.bind(eqn, *bases), eqn.params["devices"], strict=True)
    return [_move(v, base, device) if isinstance(v, AdaptedWeight) else base for v, base, device in results]


def _move(f: AdaptedWeight, base: Any, device: Any) -> AdaptedWeight:
    if device is None or isinstance(device, jax.sharding.Sharding):
        return dataclasses.replace(f, base=base)
    return dataclasses.replace(jax.device_put(dataclasses.replace(f, base=None), device), base=base)


@register_rule("transpose")
def transpose(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Permutes the labels of the axes."""
    (base,) = lazy.bind(eqn, f.base)
    return [relabel(f, base, [f.axes[k] for k in eqn.params["permutation"]])]


@register_rule("squeeze")
def squeeze(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Drops the indices of the axes that are removed."""
    (base,) = lazy.bind(eqn, f.base)
    removed = [k % len(f.axes) for k in eqn.params["dimensions"]]
    axes = [axis for k, axis in enumerate(f.axes) if k not in removed]
    for name in "".join(f.axes[k] for k in removed):
        f = drop_index(f, name)
    return [relabel(f, base, axes)]


@register_rule("reshape")
def reshape(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value] | None:
    """Splits and joins axes: an index is split if an axis ends within it, and joined axes get composite labels."""
    if f.base.size == 0:
        return None
    (base,) = lazy.bind(eqn, f.base)
    order = eqn.params["dimensions"]
    f = f if order is None else dataclasses.replace(f, axes=tuple(f.axes[k] for k in order))
    reshaped = _reshape_to(f, base)
    if reshaped is None:  # indices that were split before may have to be merged first
        reshaped = _reshape_to(merge_indices(f), base)
    return None if reshaped is None else [reshaped]


def _reshape_to(f: AdaptedWeight, base: Any) -> AdaptedWeight | None:
    """Distributes the indices over the axes of `base`, None if an axis ends where no index can be split."""
    for index in f.indices:
        if index.size == 1:  # its place among the new axes is arbitrary: new indices replace it
            f = drop_index(f, index.name)
    remaining = [name for name in f.labels if f.size(name) != 1]
    axes: list[str] = []
    for size in base.shape:
        taken = _take_axis(f, remaining, size)
        if taken is None:
            return None
        f, axis, remaining = taken
        axes.append(axis)
    new = []
    for k, axis in enumerate(axes):  # after all splits, whose new indices must not collide with these
        if not axis:
            axes[k] = fresh_indices([f.used(), *axes])
            new.append(Index(axes[k], 1))
    return relabel(f, base, axes, new)


def _take_axis(f: AdaptedWeight, remaining: list[str], size: int) -> tuple[AdaptedWeight, str, list[str]] | None:
    """The label of an axis of `size` from the first remaining indices, with the weight and the indices that remain."""
    axis, reach = "", 1
    while reach != size:
        name, *remaining = remaining
        index_size, needed = f.index(name).size, size // reach
        if needed % index_size:
            if size % reach or index_size % needed:
                return None
            f = split_index(f, name, (needed, index_size // needed))
            remaining = [f.labels[f.labels.index(name) + 1], *remaining]  # the minor part follows the major one
        axis, reach = axis + name, reach * f.index(name).size
    return f, axis, remaining


@register_rule("broadcast_in_dim")
def broadcast_in_dim(ctx: Context, eqn: Eqn, f: AdaptedWeight, *sizes: Value) -> list[Value] | None:
    """Gives new axes, and axes of size one that grow, indices that no factor has."""
    if sizes:
        return None
    (base,) = lazy.bind(eqn, f.base)
    source_axes = {target: source for source, target in enumerate(eqn.params["broadcast_dimensions"])}
    axes, new = [], []
    for k, size in enumerate(base.shape):
        source = source_axes.get(k)
        if source is not None and f.shape[source] == size:
            axes.append(f.axes[source])
            continue
        for name in "" if source is None else f.axes[source]:
            f = drop_index(f, name)
        axes.append(fresh_indices([f.used(), *axes]))
        new.append(Index(axes[-1], size))
    return [relabel(f, base, axes, new)]


@register_rule("tile")
def tile(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Gives each axis that is repeated a major index that no factor has."""
    (base,) = lazy.bind(eqn, f.base)
    axes, new = [], []
    for axis, count in zip(f.axes, eqn.params["reps"], strict=True):
        if count != 1:
            new.append(Index(fresh_indices([f.used(), *axes]), count))
            axis = new[-1].name + axis
        axes.append(axis)
    return [relabel(f, base, axes, new)]


@register_rule("rev")
def rev(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Reverses every array along the indices of the axes that are reversed."""
    (base,) = lazy.bind(eqn, f.base)
    for name in "".join(f.axes[k] for k in eqn.params["dimensions"]):
        f = map_index(f, name, lambda a, axis: lax.rev(a, (axis,)), f.index(name).size)
    return [dataclasses.replace(f, base=base)]


@register_rule("all_gather")
def all_gather(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value] | None:
    """Gathers the shards of every array that has the axis, along its major index."""
    p = eqn.params
    axis = p["all_gather_dimension"]
    major, minor_size = f.axes[axis][0], f.size(f.axes[axis][1:])
    if not p["tiled"] or any(major not in "".join(n.terms) for n in f.networks):
        return None
    (base,) = lazy.bind(eqn, f.base)

    def gather_shards(a: jax.Array, k: int) -> jax.Array:
        return lax.all_gather(a, p["axis_name"], axis=k, tiled=True, axis_index_groups=p["axis_index_groups"])

    return [dataclasses.replace(map_index(f, major, gather_shards, base.shape[axis] // minor_size), base=base)]
