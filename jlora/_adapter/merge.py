"""Merging adapters into base parameters, and removing them again."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._ir.materialize import accumulation_dtype, apply_map, delta, dense
from jlora._ir.weight import AxisMap
from jlora._tree import leaves as _quantized
from jlora._tree.paths import flatten, is_array, named_leaves
from jlora.methods._base import Adapter, Update
from jlora.methods._common.linalg import identity_like, inverse
from jlora.methods._lowering import Adapters, as_adapters, as_single, check_fits, lower_updates
from jlora.methods._sharing import untie


def merge(params: Any, adapter: Adapters, *, donate: bool = False, requantize: bool = False) -> Any:
    """Merges an adapter into base parameters: the result costs nothing extra at inference.

        maps(W) + sum of networks,    in float32 (or wider), rounded once to the dtype of W

    Arguments:
        params: the base parameters; they are not changed unless `donate`.
        adapter: the adapter, or several, which apply in order. Dropout keys are ignored.
        donate: lets the result reuse the buffers of the adapted weights, which are then deleted from `params`.
        requantize: keeps quantised weights quantised; the merged ones are rounded again. Otherwise all of them become
            plain arrays, which any program accepts.

    Returns:
        parameters with the structure, shapes, dtypes and shardings of `params`; without `requantize`, quantised weights
        are arrays of their dequantised dtype.

    Raises:
        TypeError: if `adapter` is not an adapter or a list of adapters.
        ValueError: if the adapter does not fit the parameters, with every misfit.

    Example:
        logits = model.apply(jlora.merge(params, adapter), tokens)

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """
    merged = _fold(params, as_adapters(adapter), _merge_requantized if requantize else _merge, donate)
    if requantize:
        return merged
    return _quantized.dequantize(merged)


def unmerge(params: Any, adapter: Adapters) -> Any:
    """Removes an adapter from merged parameters: the result is the base, up to rounding.

        maps^-1 (W - sum of networks),    in float32 (or wider), rounded once to the dtype of W

    Arguments:
        params: merged parameters.
        adapter: the adapter that was merged, or several, in the order in which they were merged.

    Returns:
        the base parameters, with the structure, shapes, dtypes and shardings of `params`. What a map that is not
        invertible has changed is NaN, or infinite.

    Raises:
        TypeError: if `adapter` is not an adapter or a list of adapters.
        ValueError: if the adapter does not fit the parameters, if an update depends on the base and so cannot be
            removed, or if an adapted weight is quantised. Keep the base parameters in the last two cases.

    Example:
        base = jlora.unmerge(jlora.merge(base, first), first)
    """
    adapters = as_adapters(adapter)
    for path, update in (item for each in adapters for item in each.items()):
        if update.method.depends_on_weight:
            raise ValueError(
                f"{path} has the method {type(update.method).__name__}, whose update depends on the base, "
                "so it cannot be removed. Keep the base parameters: jlora.merge does not change them."
            )
    for path, leaf in named_leaves(params):
        if _quantized.is_quantized(leaf) and any(path in adapter for adapter in adapters):
            raise ValueError(
                f"{path} is quantised, and rounding cannot be undone. Keep the base parameters: jlora.merge does not "
                "change them."
            )
    return _fold(params, adapters, _unmerge, False)


def _fold(params: Any, adapters: list[Adapter], fold_weight: Callable[..., jax.Array], donate: bool) -> Any:
    """Applies `fold_weight(weight, adapters)` to every adapted weight.

    An array that `params` holds at several paths is not donated.
    """
    leaves, structure = named_leaves(params), flatten(params)[1]
    check_fits(adapters, {path: leaf for path, leaf in leaves if is_array(leaf)})
    adapters = [untie(adapter) for adapter in adapters]
    keeping, donating = jax.jit(fold_weight), jax.jit(fold_weight, donate_argnums=(0,))
    new, counts = [], collections.Counter(id(leaf) for _, leaf in leaves)
    for path, leaf in leaves:  # the path "" for all, so that weights of one shape share a compiled program
        updates = [{"": dataclasses.replace(adapter[path], key=None)} for adapter in adapters if path in adapter]
        run = donating if donate and counts[id(leaf)] == 1 and not _quantized.is_quantized(leaf) else keeping
        try:
            with jax.default_matmul_precision("highest"):
                new.append(run(leaf, updates) if updates else leaf)
        except ValueError as error:
            raise ValueError(f"{path} cannot be merged. {error}") from error
    return jax.tree.unflatten(structure, new)


def _merge(w: jax.Array, adapters: list[Adapter]) -> jax.Array:
    return dense(lower_updates(adapters, w, ""))


def _merge_requantized(w: Any, adapters: list[Adapter]) -> Any:
    merged = _merge(w, adapters)
    return _quantized.requantize(w, merged) if _quantized.is_quantized(w) else merged


def _unmerge(w: jax.Array, adapters: list[Adapter]) -> jax.Array:
    value = w.astype(accumulation_dtype(w.dtype))
    for adapter in reversed(adapters):
        lowered = lower_updates([adapter], value, "")
        value = value - delta(lowered, value.dtype)
        for m in reversed(lowered.maps):
            value = apply_map(_inverse_of(m), lowered, value)
    return value.astype(w.dtype)


def _inverse_of(m: AxisMap) -> AxisMap:
    """The map that undoes a map: M^-1 = (M^T M)^-1 M^T for each block, which is M^T if M is a rotation.

    Its error grows with the square of M's condition number. Each step of Newton, X + (1 - X M) X, squares it. A block
    that cannot be inverted in its precision becomes NaN.
    """
    if not m.new:
        return dataclasses.replace(m, array=1 / m.array)
    order = "".join(c for c in m.indices if c not in m.new + m.old) + m.new + m.old
    array = m.array.transpose([m.indices.index(c) for c in order])
    batch = array.shape[: len(order) - 2 * len(m.new)]
    size = math.prod(array.shape[len(batch) : len(batch) + len(m.new)])
    blocks = array.reshape(*batch, size, size)
    with jax.default_matmul_precision("highest"):
        inverted = inverse(blocks.mT @ blocks) @ blocks.mT
        for _ in range(4):
            error = identity_like(blocks) - inverted @ blocks
            converges = jnp.linalg.norm(error, axis=(-2, -1), keepdims=True) < 1
            inverted = jnp.where(converges, inverted + error @ inverted, jnp.nan)
    return AxisMap(inverted.reshape(array.shape), order, m.new, m.old)


def scale(adapter: Adapter, factor: float | jax.Array) -> Adapter:
    """Multiplies every update by a number: 0 gives the base, 1 the adapter as it is.

    Arguments:
        adapter: the adapter.
        factor: a number, which is static: another one compiles again, and 0 leaves the adapter out of the program. Or a
            scalar that is traced (an argument of a function under `jax.jit`), which costs one product with a factor.

    Returns:
        the adapter with the same arrays. After a traced factor each update has its scale as one more array.

    Raises:
        TypeError: if `adapter` is not an adapter, or `factor` is not a scalar.

    Example:
        half = jlora.merge(params, jlora.scale(adapter, 0.5))
        blend = jax.jit(lambda strength: jlora.adapt(f)(params, jlora.scale(adapter, strength), x))
    """
    adapter = as_single(adapter)
    if not _compat.is_tracer(factor):
        factor = float(factor)
        return {path: dataclasses.replace(update, scale=update.scale * factor) for path, update in adapter.items()}
    if jnp.shape(factor):
        raise TypeError(f"scale expects a scalar, not an array of shape {jnp.shape(factor)}: use jax.vmap.")

    def multiplied(update: Update) -> Update:
        before = update.traced_scale
        scale = jnp.asarray(factor) if before is None else before * jnp.asarray(factor, before.dtype)
        return dataclasses.replace(update, traced_scale=scale)

    return {path: multiplied(update) for path, update in adapter.items()}
