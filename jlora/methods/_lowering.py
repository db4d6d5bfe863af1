"""From adapters to factored weights, with the checks that they fit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jlora._ir.algebra import concatenate_ranks
from jlora._ir.explicit_mesh import explicit_axes, under_auto_axes
from jlora._ir.partition import shardings_like
from jlora._ir.weight import AdaptedWeight, as_adapted_weight
from jlora._tree.paths import closest_matches
from jlora.methods._base import Adapter, Update

Adapters = Adapter | Sequence[Adapter]


def as_adapters(adapters: Adapters) -> list[Adapter]:
    """One adapter or several, in the order in which they apply."""
    listed = [adapters] if isinstance(adapters, Mapping) else adapters
    if not isinstance(listed, Sequence) or not all(isinstance(adapter, Mapping) for adapter in listed):
        raise TypeError(
            "An adapter is what jlora.init gives, a dict of updates by path, or a list of such; it comes after the "
            f"parameters. This is {type(adapters).__name__}."
        )
    for path, update in (item for adapter in listed for item in adapter.items()):
        if not isinstance(update, Update):
            raise TypeError(
                f"An adapter maps paths to updates as jlora.init makes them; {path!r} holds {type(update).__name__}. "
                "It comes after the parameters."
            )
    return list(listed)


def as_single(adapter: Adapter) -> Adapter:
    """The adapter, where it is one."""
    if isinstance(adapter, (list, tuple)):
        raise TypeError("This takes one adapter; call it for each one of the list.")
    return as_adapters(adapter)[0]


def lower_updates(adapters: Sequence[Adapter], leaf: Any, path: str) -> AdaptedWeight:
    """A weight with all its updates, one after the other."""

    def fun(leaf: Any, updates: list[Update]) -> AdaptedWeight:
        w = as_adapted_weight(leaf, path)
        for update in updates:
            w = concatenate_ranks(_apply_update(_at_least(update, w.dtype), w))
        return w

    updates = [adapter[path] for adapter in adapters if path in adapter]
    if not explicit_axes(leaf):
        return fun(leaf, updates)
    there = jax.typeof(leaf).sharding
    shapes = jax.eval_shape(under_auto_axes(fun, leaf, NamedSharding(there.mesh, PartitionSpec())), leaf, updates)
    return under_auto_axes(fun, leaf, shardings_like(shapes, there))(leaf, updates)


def _at_least(update: Update, dtype: Any) -> Update:
    """The update with no array narrower than the weight: scales and vectors are multiplied into them."""

    def wide(a: Any) -> Any:
        narrow = jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < jnp.finfo(dtype).bits
        return a.astype(dtype) if narrow else a

    return jax.tree.map(wide, update)


def _apply_update(update: Update, w: AdaptedWeight) -> AdaptedWeight:
    if update.scale == 0:
        return w
    out = update.method.lower(update, w)
    if not update.method.offset:
        return out
    initial = jax.lax.stop_gradient(update.initial)
    at_start = update.method.lower(dataclasses.replace(update, factors=initial), w)
    subtracted = tuple(dataclasses.replace(n, scale=-n.scale) for n in at_start.networks[len(w.networks) :])
    return dataclasses.replace(out, networks=(*out.networks, *subtracted))


def check_fits(adapters: Sequence[Adapter], leaves: Mapping[str, Any]) -> None:
    """Raises, with every misfit, unless each update has its weight among `leaves`."""
    misfits = []
    for path, update in (item for adapter in adapters for item in adapter.items()):
        if path not in leaves:
            misfits.append(
                f"{path}: no such parameter" + (f" ({closest_matches(path, leaves)})" if len(misfits) < 5 else "")
            )
            continue
        leaf = leaves[path]
        if tuple(leaf.shape) != update.shape:
            misfits.append(
                f"{path}: the adapter was made for shape {update.shape}, the parameter has {tuple(leaf.shape)}"
            )
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            misfits.append(f"{path}: the parameter's dtype {leaf.dtype} is not floating-point")
    if misfits:
        raise ValueError(
            "The adapter does not fit these parameters. Pass the tree it was made for (jlora.trace, jlora.init):\n  "
            + "\n  ".join(misfits)
        )
