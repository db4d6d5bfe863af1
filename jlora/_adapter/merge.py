"""Folding adapters into their base, and out of it again."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jlora._ir.materialize import accumulation_dtype, broadcast_axis_scale, delta, dense
from jlora._tree import leaves as _quantized
from jlora._tree.paths import flatten, is_array, named_leaves
from jlora.methods._base import Adapter
from jlora.methods._lowering import Adapters, as_adapters, as_single, check_fits, lower_updates


def merge(params: Any, adapter: Adapters, *, donate: bool = False, requantize: bool = False) -> Any:
    """Folds an adapter into its base: plain parameters, with no cost at inference.

        W * axis scales + sum of networks,    in float32 (or wider), rounded once to the dtype of W

    Arguments:
        params: the base parameters; they stay as they are.
        adapter: the adapter, or several, which apply in order. Dropout keys are ignored.
        donate: lets the result reuse the buffers of the adapted weights, which are gone from `params` afterwards.
        requantize: keeps quantised weights in their form, the merged ones rounded again. Otherwise all of them become
            plain arrays, which any program takes.

    Returns:
        parameters of the structure, shapes, dtypes and shardings of `params`.

    Raises:
        ValueError: where the adapter does not fit the parameters, with every misfit.
    """
    merged = _fold(params, as_adapters(adapter), _merged_again if requantize else _merged, donate)
    if requantize:
        return merged
    return jax.tree.map(
        lambda w: _quantized.dequantize(w) if _quantized.is_quantized(w) else w, merged, is_leaf=_quantized.is_quantized
    )


def unmerge(params: Any, adapter: Adapters) -> Any:
    """Takes an adapter out of merged parameters: the base again, up to rounding.

        (W - sum of networks) / axis scales,    in float32 (or wider), rounded once to the dtype of W

    Arguments:
        params: merged parameters.
        adapter: the adapter that was merged, or several, in the order in which they were merged.

    Raises:
        ValueError: where the adapter does not fit the parameters, or depends on the base itself and so cannot be
            taken out of what it became; keep the base instead.
    """
    adapters = as_adapters(adapter)
    for path, update in (item for each in adapters for item in each.items()):
        if update.method.depends_on_weight:
            raise ValueError(
                f"{path} has the method {type(update.method).__name__}, whose update depends on the base, "
                "so it cannot be taken out again. Keep the base parameters: jlora.merge leaves them as they are."
            )
    for path, leaf in named_leaves(params):
        if _quantized.is_quantized(leaf) and any(path in adapter for adapter in adapters):
            raise ValueError(
                f"{path} is quantised, and what was rounded cannot be taken out. Keep the base parameters."
            )
    return _fold(params, adapters, _unmerged, False)


def _fold(params: Any, adapters: list[Adapter], fold_one: Callable[..., jax.Array], donate: bool) -> Any:
    leaves, structure = named_leaves(params), flatten(params)[1]
    check_fits(adapters, {path: leaf for path, leaf in leaves if is_array(leaf)})
    plain, donating = jax.jit(fold_one), jax.jit(fold_one, donate_argnums=(0,))
    new, times = [], collections.Counter(id(leaf) for _, leaf in leaves)
    for path, leaf in leaves:  # under one name for all, so that weights of one shape share a compiled program
        mine = [{"": dataclasses.replace(a[path], key=None)} for a in adapters if path in a]
        run = donating if donate and times[id(leaf)] == 1 and not _quantized.is_quantized(leaf) else plain
        try:
            new.append(run(leaf, mine) if mine else leaf)
        except ValueError as error:
            raise ValueError(f"{path} cannot be merged. {error}") from error
    return jax.tree.unflatten(structure, new)


def _merged(w: jax.Array, adapters: list[Adapter]) -> jax.Array:
    return dense(lower_updates(adapters, w, ""))


def _merged_again(w: Any, adapters: list[Adapter]) -> Any:
    merged = _merged(w, adapters)
    return _quantized.requantize(w, merged) if _quantized.is_quantized(w) else merged


def _unmerged(w: jax.Array, adapters: list[Adapter]) -> jax.Array:
    value = w.astype(accumulation_dtype(w.dtype))
    for adapter in reversed(adapters):
        f = lower_updates([adapter], value, "")
        scales = [broadcast_axis_scale(scale, f, value.dtype) for scale in f.axis_scales]
        value = functools.reduce(jax.numpy.divide, scales, value - delta(f, value.dtype))
    return value.astype(w.dtype)


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Multiplies every update by a number: 0 gives the base, 1 the adapter as it is.

    Arguments:
        adapter: the adapter.
        factor: a Python number; it is part of the adapter's structure, not of its arrays.
    """
    factor = float(factor)
    return {
        path: dataclasses.replace(update, scale=update.scale * factor) for path, update in as_single(adapter).items()
    }
