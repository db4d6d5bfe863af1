"""Initialisation of adapters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jlora._adapter.targets import Targets, select_methods
from jlora._interpreter.site import Site
from jlora._ir.explicit_mesh import explicit_axes, under_auto_axes
from jlora._trace.sites import Sites
from jlora._tree.leaves import as_array
from jlora._tree.paths import named_leaves, path_number
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._common.layers import layer_axis, layers_of, numbers_of_layers
from jlora.methods._new_arrays import new_arrays
from jlora.methods._sharing import share


def init(
    key: jax.Array, sites: Sites, targets: Targets, *, params: Any = None, dtype: DTypeLike = jnp.float32
) -> Adapter:
    """Initialises an adapter; it works under `jax.jit` and `jax.eval_shape` too.

    Arguments:
        key: a PRNG key. The key of each update is folded from its path, so adding a target changes no other update.
        sites: from `jlora.trace`.
        targets: a dict from patterns (`re.fullmatch` on the path; the first match decides) to methods, None to exclude;
            or a function that returns the method of a path and its `Site`, or None; or one method for every weight that
            is consumed directly by a matmul or a convolution. Weights that are normalised, masked or clipped before use
            are not selected; `print(sites)` shows all.
        params: the base parameters, for methods and starts that depend on their values (PiSSA, LoRA-XS, ...).
        dtype: of the factors.

    Returns:
        the adapter, a dict from path to `Update`.

    Raises:
        TypeError: if `sites` is not from `jlora.trace`, or a target is not a method.
        ValueError: if a pattern matches no path, is shadowed, or matches a weight that its method cannot adapt; if a
            method needs `params` and they are missing, or do not match the sites.

    Example:
        adapter = jlora.init(jax.random.key(0), sites, {r".*/(query|value)/kernel": jlora.LoRA(rank=8)})
        wide = lambda path, site: jlora.LoRA(rank=8) if site.max_rank > 256 else None
        adapter = jlora.init(jax.random.key(0), sites, wide)
    """
    leaves = dict(named_leaves(params))
    return share(
        {
            path: new_update(key, sites[path], method, dtype, leaves.get(path))
            for path, method in select_methods(sites, targets).items()
        }
    )


def new_update(
    key: jax.Array, site: Site, method: Method, dtype: DTypeLike, weight: Any, *, is_supported: bool = False
) -> Update:
    """A new update for a site, whose key is folded from its path.

    Arguments:
        key, dtype: as for `init`.
        site, method: the weight and its method.
        weight: the base parameter; None if it is not known.
        is_supported: whether the method is known to fit the site, so that only the rest is checked.
    """
    layers = numbers_of_layers(method.layers, site.path, site)
    method, whole = dataclasses.replace(method, layers=layers), site
    site = _of_layers(site, layers)
    _check(site, method, weight, whole.shape, is_supported)
    key = jax.random.fold_in(key, path_number(site.path))
    if method.init_needs_weight:
        value = layers_of(as_array(weight), layers, whole)
        start = under_auto_axes(lambda k, w: new_arrays(method, k, site, dtype, w), value, _replicated(value))
        arrays = start(key, value)
    else:
        arrays = new_arrays(method, key, site, dtype, None)
    method = method.without_init_fields()
    factors = {name: array for name, array in arrays.items() if name not in method.frozen}
    frozen = {name: arrays[name] for name in method.frozen if name in arrays}
    initial = {name: jnp.copy(array) for name, array in factors.items()} if method.offset else {}
    return Update(factors, method, site.roles, whole.shape, frozen, initial=initial)


def _of_layers(site: Site, layers: tuple[int, ...] | None) -> Site:
    """The weight as if it had the updated layers alone."""
    if layers is None:
        return site
    axis = layer_axis(site)
    return dataclasses.replace(site, shape=(*site.shape[:axis], len(layers), *site.shape[axis + 1 :]))


def _replicated(weight: jax.Array) -> NamedSharding | None:
    """Where factors are placed that start from a weight on a mesh with Explicit axes."""
    return NamedSharding(jax.typeof(weight).sharding.mesh, PartitionSpec()) if explicit_axes(weight) else None


def _check(site: Site, method: Method, weight: Any, shape: tuple[int, ...], is_supported: bool) -> None:
    name = type(method).__name__
    reason = "" if is_supported else method.unsupported_reason(site)
    if reason:
        other = " Or use jlora.Full(), which adapts any shape." if site.is_trainable else ""
        raise ValueError(
            f"{name} cannot adapt {site.path} {site.shape}: {reason}. "
            f"Narrow the pattern, or exclude the path with an earlier pattern and None.{other}"
        )
    if method.offset and method.is_multiplicative:
        raise ValueError(
            f"{site.path}: {name} multiplies the weight, so it equals the base at the start without an offset. Set "
            "offset=False."
        )
    if method.init_needs_weight and weight is None:
        raise ValueError(f"{method} starts from the weight {site.path}: pass jlora.init(..., params=params).")
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(
            f"{site.path} has shape {tuple(weight.shape)} in params, and {shape} in the traced program. Pass the "
            "parameters that were traced."
        )
