"""Folding an adapter into its base, and out of it again."""

import dataclasses
from typing import Any

import jax

from jlora._factored import Factored, delta, dense, weight, widened
from jlora._lower import check, lowered
from jlora._method import Adapter, Update
from jlora._paths import is_array, named_leaves


def merge(params: Any, adapter: Adapter, *, donate: bool = False) -> Any:
    """Folds an adapter into its base: plain parameters, with no cost at inference.

        W + sum of networks,    in float32 (or wider), rounded once to the dtype of W

    Arguments:
        params: the base parameters; they stay as they are.
        adapter: the adapter. Dropout keys are ignored.
        donate: lets the result reuse the buffers of the adapted weights, which are gone from `params` afterwards.

    Returns:
        parameters of the structure, shapes, dtypes and shardings of `params`.

    Raises:
        ValueError: where the adapter does not fit the parameters, with every misfit.
    """
    return _fold(params, adapter, _merged, donate)


def unmerge(params: Any, adapter: Adapter) -> Any:
    """Takes an adapter out of merged parameters: the base again, up to rounding.

        W - sum of networks,    in float32 (or wider), rounded once to the dtype of W

    Arguments:
        params: merged parameters.
        adapter: the adapter that was merged.
    """
    return _fold(params, adapter, _unmerged, False)


def _fold(params: Any, adapter: Adapter, one: Any, donate: bool) -> Any:
    leaves = named_leaves(params)
    check(adapter, {path: leaf for path, leaf in leaves if is_array(leaf)})
    run = jax.jit(one, static_argnames=("path",), donate_argnums=(0,) if donate else ())
    new = [run(leaf, adapter[path], path=path) if path in adapter else leaf for path, leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), new)


def _lowered(w: jax.Array, update: Update, path: str) -> Factored:
    return lowered(dataclasses.replace(update, key=None), weight(w, path))


def _merged(w: jax.Array, update: Update, path: str) -> jax.Array:
    return dense(_lowered(w, update, path))


def _unmerged(w: jax.Array, update: Update, path: str) -> jax.Array:
    f = _lowered(w, update, path)
    wide = widened(w.dtype)
    return (w.astype(wide) - delta(f, wide)).astype(w.dtype)


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Multiplies every update by a number: 0 gives the base, 1 the adapter as it is.

    Arguments:
        adapter: the adapter.
        factor: a Python number; it is part of the adapter's structure, not of its arrays.
    """
    factor = float(factor)
    return {path: dataclasses.replace(update, scale=update.scale * factor) for path, update in adapter.items()}
