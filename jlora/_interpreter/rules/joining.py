"""Several weights in one: `concatenate` and `stack` (a fused projection)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.registry import register_rule
from jlora._interpreter.rules.slicing import pad_index
from jlora._ir import lazy
from jlora._ir.algebra import merge_indices, relabel, rename_indices
from jlora._ir.weight import AdaptedWeight, Index, fresh_indices


@register_rule("concatenate")
def concatenate(ctx: Context, eqn: Eqn, *values: Value) -> list[Value] | None:
    """Pads each network with zeros to the size of the result."""
    values = tuple(merge_indices(v) if isinstance(v, AdaptedWeight) else v for v in values)
    if not can_join(*values):
        return None
    (base,) = lazy.bind(eqn, *(v.base if isinstance(v, AdaptedWeight) else v for v in values))
    return [_concatenate(values, base, eqn.params["dimension"])]


@register_rule("stack")
def stack(ctx: Context, eqn: Eqn, *values: Value) -> list[Value] | None:
    """Adds an axis of size one to each weight, and concatenates them along it."""
    values = tuple(merge_indices(v) if isinstance(v, AdaptedWeight) else v for v in values)
    if not can_join(*values):
        return None
    (base,) = lazy.bind(eqn, *(v.base if isinstance(v, AdaptedWeight) else v for v in values))
    axis = eqn.params["axis"]
    return [_concatenate([_expand_dims(v, axis) for v in values], base, axis)]


def can_join(*values: Value) -> bool:
    """Whether the weights among the values are matrices with one index for each axis, so that `join` takes them."""
    weights = [v for v in values if isinstance(v, AdaptedWeight)]
    return all(f.is_matrix and all(len(axis) == 1 for axis in f.axes) for f in weights)


def _expand_dims(value: Value, axis: int) -> Value:
    """The value with an axis of size one; of a weight's base only the shape."""
    if not isinstance(value, AdaptedWeight):
        return jnp.expand_dims(value, axis)
    name = fresh_indices([value.used()])
    shape = jax.ShapeDtypeStruct((*value.shape[:axis], 1, *value.shape[axis:]), value.dtype)
    return relabel(value, shape, [*value.axes[:axis], name, *value.axes[axis:]], [Index(name, 1)])


def _concatenate(values: Sequence[Value], base: Any, axis: int) -> AdaptedWeight:
    size, start, parts = base.shape[axis], 0, []
    for v in values:
        stop = start + v.shape[axis]
        if isinstance(v, AdaptedWeight):
            parts.append(pad_index(v, v.axes[axis], (start, size - stop, 0), size))
        start = stop
    return join(parts, base)


def join(weights: Sequence[AdaptedWeight], base: Any) -> AdaptedWeight:
    """One weight with the networks and multipliers of several, which have one index for each axis and equal sizes.

    Arguments:
        weights: the weights.
        base: the base of the result.
    """
    first = weights[0]
    aligned = [first, *(_with_indices_of(first, f) for f in weights[1:])]
    origins = {name: tuple(origin for f in aligned for origin in f.index(name).origins) for name in first.axes}
    return AdaptedWeight(
        base,
        networks=tuple(network for f in aligned for network in f.networks),
        axes=first.axes,
        indices=tuple(Index(name, size, origins[name]) for name, size in zip(first.axes, base.shape, strict=True)),
        paths=tuple(dict.fromkeys(path for f in aligned for path in f.paths)),
        maps=tuple(m for f in aligned for m in f.maps),
        multiplied=_multiplied(aligned),
    )


def _multiplied(weights: Sequence[AdaptedWeight]) -> tuple[str, ...] | None:
    """What is dense if the joined weight is materialised: all of its parameters, unless each part is a product."""
    if all(f.multiplied is None for f in weights):
        return None
    return tuple(path for f in weights for path in (f.paths if f.multiplied is None else f.multiplied))


def _with_indices_of(first: AdaptedWeight, second: AdaptedWeight) -> AdaptedWeight:
    """The second weight with the first one's labels; its other indices are renamed so that none has such a label."""
    ranks = [c for c in dict.fromkeys(second.used()) if c not in second.axes]
    distinct = fresh_indices([second.used(), first.used()], len(ranks) + len(second.axes))
    second = rename_indices(second, dict(zip([*ranks, *second.axes], distinct, strict=True)))
    return rename_indices(second, dict(zip(second.axes, first.axes, strict=True)))
