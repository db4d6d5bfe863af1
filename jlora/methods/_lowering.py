"""From adapters to factored weights, with the checks that they fit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jlora._ir.explicit_mesh import auto, explicit
from jlora._ir.partition import laid
from jlora._ir.weight import Factored, joined, weight
from jlora._tree.paths import near
from jlora.methods._base import Adapter, Update

Adapters = Adapter | Sequence[Adapter]

START = "_at_start"  # what the name of a factor's frozen copy ends in


def as_list(adapters: Adapters) -> list[Adapter]:
    """One adapter or several, in the order in which they apply."""
    listed = [adapters] if isinstance(adapters, Mapping) else adapters
    if not isinstance(listed, Sequence) or not all(isinstance(one, Mapping) for one in listed):
        raise TypeError(
            "An adapter is what jlora.init gives, a dict of updates by path, or a list of such; it comes after the "
            f"parameters. This is {type(adapters).__name__}."
        )
    for path, update in (item for one in listed for item in one.items()):
        if not isinstance(update, Update):
            raise TypeError(
                f"An adapter maps paths to updates as jlora.init makes them; {path!r} holds {type(update).__name__}. "
                "It comes after the parameters."
            )
    return list(listed)


def one(adapter: Adapter) -> Adapter:
    """The adapter, where it is one."""
    if isinstance(adapter, (list, tuple)):
        raise TypeError("This takes one adapter; call it for each one of the list.")
    return as_list(adapter)[0]


def lowered(adapters: Sequence[Adapter], leaf: Any, path: str) -> Factored:
    """A weight with all its updates, one after the other."""

    def fun(leaf: Any, updates: list[Update]) -> Factored:
        w = weight(leaf, path)
        for update in updates:
            w = joined(_updated(_widened(update, w.dtype), w))
        return w

    updates = [adapter[path] for adapter in adapters if path in adapter]
    if not explicit(leaf):
        return fun(leaf, updates)
    there = jax.typeof(leaf).sharding
    shapes = jax.eval_shape(auto(fun, leaf, NamedSharding(there.mesh, PartitionSpec())), leaf, updates)
    return auto(fun, leaf, laid(shapes, there))(leaf, updates)


def _widened(update: Update, dtype: Any) -> Update:
    """The update with no array narrower than the weight: scales and vectors are multiplied into them."""

    def wide(a: Any) -> Any:
        narrow = jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < jnp.finfo(dtype).bits
        return a.astype(dtype) if narrow else a

    return jax.tree.map(wide, update)


def _updated(update: Update, w: Factored) -> Factored:
    out = update.method.lower(update, w)
    if not update.method.offset:
        return out
    start = {name: update[name + START] for name in update.factors}
    there = update.method.lower(dataclasses.replace(update, factors=start), w)
    back = tuple(dataclasses.replace(n, scale=-n.scale) for n in there.networks[len(w.networks) :])
    return dataclasses.replace(out, networks=(*out.networks, *back))


def check(adapters: Sequence[Adapter], leaves: Mapping[str, Any]) -> None:
    """Raises, with every misfit, unless each update has its weight among `leaves`."""
    misfits = []
    for path, update in (item for adapter in adapters for item in adapter.items()):
        if path not in leaves:
            misfits.append(f"{path}: no such parameter" + (f" ({near(path, leaves)})" if len(misfits) < 5 else ""))
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
