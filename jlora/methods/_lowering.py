"""Lowers the updates of adapters to adapted weights, and checks that they fit the parameters."""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jlora._ir.algebra import concatenate_ranks, widened
from jlora._ir.explicit_mesh import explicit_axes, type_sharding, under_auto_axes
from jlora._ir.layers import put_entries, take_entries
from jlora._ir.materialize import accumulation_dtype, dense, widest_dtype
from jlora._ir.partition import shardings_like
from jlora._ir.structured import with_matrices
from jlora._ir.weight import AdaptedWeight, TensorNetwork, as_adapted_weight
from jlora._tree.paths import closest_matches
from jlora.methods._base import Adapter, Update
from jlora.methods._common.division import divides_alike, with_undivided_axes
from jlora.methods._common.layers import layer_axis

Adapters = Adapter | Sequence[Adapter]


def as_adapters(adapters: Adapters) -> list[Adapter]:
    """One adapter or several as a list, in the order in which they apply.

    Raises:
        TypeError: if `adapters` is not an adapter or a list of adapters.
    """
    listed = [adapters] if isinstance(adapters, Mapping) else adapters
    if not isinstance(listed, Sequence):
        raise _not_adapter(adapters, "a dict from paths to updates, or a list of adapters")
    for adapter in listed:
        _check_type(adapter)
    return list(listed)


def as_single(adapter: Adapter) -> Adapter:
    """The adapter itself, after a check of its type.

    Raises:
        TypeError: if `adapter` is a list of adapters, or not an adapter.
    """
    if isinstance(adapter, (list, tuple)):
        raise TypeError("Expected one adapter, found a list; call this function for each adapter of the list.")
    _check_type(adapter)
    return adapter


def _check_type(adapter: Any) -> None:
    if not isinstance(adapter, Mapping):
        raise _not_adapter(adapter, "a dict from paths to updates")
    for path, update in adapter.items():
        if isinstance(update, Update):
            continue
        hint = "Where params is an argument too, the adapter follows it."
        if isinstance(update, Mapping) and update and all(isinstance(u, Update) for u in update.values()):
            hint = f"That is an adapter itself: pass it alone, tree[{path!r}]; jlora.bank.stack stacks several."
        raise TypeError(
            f"An adapter maps paths to the updates that jlora.init returns, but {path!r} maps to "
            f"{type(update).__name__}. {hint}"
        )


def _not_adapter(given: Any, expected: str) -> TypeError:
    """The error for something that is not an adapter, with what to pass for it."""
    kind = type(given).__name__
    hint = "Where params is an argument too, the adapter follows it."
    if given is None:
        hint = "The empty adapter, {}, is the base."
    elif kind == "Bank":
        hint = "jlora.bank.apply and jlora.bank.vmap take a bank; bank[name] is one adapter of it."
    elif "flax.nnx" in sys.modules and isinstance(given, sys.modules["flax.nnx"].Module):
        hint = "jlora.nnx.adapter(model) is the adapter of an adapted module."
    return TypeError(f"Expected an adapter as jlora.init returns it, {expected}, found {kind}. {hint}")


def lower_updates(adapters: Sequence[Adapter], leaf: Any, path: str) -> AdaptedWeight:
    """A parameter as an adapted weight, with the updates of all adapters applied in order."""

    def lower(leaf: Any, updates: list[Update]) -> AdaptedWeight:
        w = as_adapted_weight(leaf, path)
        for update in updates:
            w = concatenate_ranks(_apply_update(_widened(update, w.dtype), with_matrices(w)))
        return w

    updates = [adapter[path] for adapter in adapters if path in adapter]
    if not explicit_axes(leaf):
        return lower(leaf, updates)
    sharding = type_sharding(leaf)

    def lower_alone(leaf: Any, updates: list[Update]) -> AdaptedWeight:
        return dataclasses.replace(with_matrices(lower(leaf, updates)), base=None)

    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    shapes = jax.eval_shape(under_auto_axes(lower_alone, leaf, replicated), leaf, updates)
    placed = dataclasses.replace(shardings_like(shapes, sharding), base=None)
    w = under_auto_axes(lower_alone, leaf, placed)(leaf, updates)
    return dataclasses.replace(w, base=as_adapted_weight(leaf, path).base)  # no method changes the base


def _widened(update: Update, dtype: DTypeLike) -> Update:
    """The update with every array at least as wide as the weight: scales and vectors are multiplied into the arrays.

    Of the factors of a bank those of one member are widened, by the equation that uses them. Scales in float64 are no
    wider than the factors that they multiply.
    """
    wide = jax.tree.map(lambda a: widened(a, dtype), update)
    if update.rank_mask is not None:
        wide = dataclasses.replace(wide, rank_mask=wide.rank_mask.astype(widest_dtype((wide.factors, wide.frozen))))
    return wide if update.member is None else dataclasses.replace(wide, factors=update.factors, frozen=update.frozen)


def _with_one_scale(update: Update) -> Update:
    """The update with its traced scale as part of its scale, in the dtype of the factors."""
    if update.traced_scale is None:
        return update
    dtype = next(a.dtype for a in jax.tree.leaves(update.factors) if jnp.issubdtype(a.dtype, jnp.floating))
    return dataclasses.replace(update, scale=update.scale * update.traced_scale.astype(dtype), traced_scale=None)


def with_static_scale(path: str, update: Update) -> Update:
    """The update with its traced scale as part of its static one, for files.

    Arguments:
        path: of the weight, for the error.
        update: the update, with known values.

    Raises:
        ValueError: if the traced scale is not one number, as in the stacked arrays of a bank.
    """
    if update.traced_scale is None:
        return update
    if jnp.ndim(update.traced_scale):
        raise ValueError(
            f"{path} has {jnp.size(update.traced_scale)} scales, one for each member of a bank. Take one member: "
            "bank[name]."
        )
    return dataclasses.replace(update, scale=update.scale * float(update.traced_scale), traced_scale=None)


def _apply_update(update: Update, w: AdaptedWeight) -> AdaptedWeight:
    """The weight with what the update adds; with an offset, what its initial factors add is subtracted."""
    if update.scale == 0:
        return w
    layers = update.layers
    if layers is not None:
        axis, method = layer_axis(update), update.method
        part = take_entries(w, axis, layers, reads_base=method.depends_on_weight or method.is_multiplicative)
        out = _apply_update(update.part, part)
        if not divides_alike(part, out):
            return _apply_update(update, with_undivided_axes(w, w.labels))
        return put_entries(w, part, out, axis, layers)
    update = _with_one_scale(update)
    out = update.method.lower(update, w)
    if not isinstance(out, AdaptedWeight):
        raise TypeError(
            f"{type(update.method).__name__}.lower returned {type(out).__name__}: return the weight that it got, with "
            "what the update adds, as jlora.extend.add_network returns it."
        )
    if not update.method.offset:
        return out
    if not divides_alike(w, out):
        return _apply_update(update, with_undivided_axes(w, w.labels))
    initial = jax.lax.stop_gradient(update.initial)
    at_start = update.method.lower(dataclasses.replace(update, factors=initial), w)
    added = at_start.networks[len(w.networks) :]
    if len(at_start.maps) > len(w.maps):
        dtype = accumulation_dtype(w.dtype)
        change = (dense(at_start, dtype) - dense(w, dtype)).reshape([out.size(c) for c in out.labels])
        added = (TensorNetwork((change,), (out.labels,)),)
    subtracted = tuple(dataclasses.replace(n, scale=-n.scale) for n in added)
    return dataclasses.replace(out, networks=(*out.networks, *subtracted))


def _check_factors(path: str, update: Update, ids: Collection[int]) -> None:
    """Checks that the factors of an update are arrays, and none of the parameters.

    Arguments:
        path: of the weight.
        update: the update.
        ids: of the parameters, as `id` gives them.
    """
    for name, factor in update.factors.items():
        if factor is None:
            raise TypeError(
                f"{path}: the factor {name!r} is None, expected an array. Combine the parts of an adapter that was "
                "split (equinox.combine) before it is used."
            )
        if id(factor) in ids:
            raise ValueError(
                f"{path}: the parameters hold the factors of this adapter, so the update would apply twice. Of a "
                "module that jlora.nnx.adapt returned pass jlora.nnx.base(model), or merge it by jlora.nnx.merge."
            )


def check_fits(adapters: Sequence[Adapter], leaves: Mapping[str, Any]) -> None:
    """Checks that each update has its weight among `leaves`, by path.

    Raises:
        TypeError: if one of `adapters` is not an adapter, or a factor is None.
        ValueError: if a path is missing, or a weight has another shape or is not floating-point; with every misfit. If
            the factors are among the leaves.
    """
    misfits, ids = [], {id(leaf) for leaf in leaves.values()}
    for path, update in (item for adapter in as_adapters(adapters) for item in adapter.items()):
        _check_factors(path, update, ids)
        if path not in leaves:
            misfits.append(
                f"{path}: no such parameter" + (f" ({closest_matches(path, leaves)})" if len(misfits) < 5 else "")
            )
            continue
        leaf = leaves[path]
        if tuple(leaf.shape) != update.shape:
            misfits.append(
                f"{path}: the adapter was initialised for shape {update.shape}, the parameter has {tuple(leaf.shape)}"
            )
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            misfits.append(f"{path}: the parameter's dtype {leaf.dtype} is not floating-point")
    if misfits:
        raise ValueError(
            "The adapter does not fit these parameters. Pass the parameters that were traced for jlora.init:\n  "
            + "\n  ".join(misfits)
        )
