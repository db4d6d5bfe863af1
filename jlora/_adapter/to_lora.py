"""Converts updates of low rank to plain LoRA: from their factors, or by a singular value decomposition."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from jlora._adapter.change import change_of, is_matrix, is_plain, matrix_sizes, wide_dtype
from jlora._adapter.svd import Cut, Index, Layer, Pair, is_thin, truncated_svd
from jlora._tree.paths import named_leaves
from jlora.methods._base import Adapter, Update
from jlora.methods._common.factor_axes import HasAxes
from jlora.methods._lowering import as_single, with_static_scale
from jlora.methods._sharing import untie
from jlora.methods.lora import LoRA


def to_lora(
    adapter: Adapter,
    params: Any = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float = 1e-6,
) -> tuple[Adapter, dict[str, float]]:
    """Converts every update to a plain LoRA that adds the same matrix to its weight.

    If the factors of the update give a LoRA that is smaller than the weight, they are reused: the ranks of its
    networks, a subtracted start included, are summed. Otherwise the change of the weight is decomposed by an SVD.

        W + sum_k s_k A_k B_k  =  W + s [A_1 A_2 ...] [B_1; (s_2 / s) B_2; ...]

    With `rank` or `energy` every update of a higher rank is truncated, plain LoRA included. All layers of a stack have
    one rank; they are decomposed one after the other.

    Arguments:
        adapter: the adapter. Updates of weights that are not matrices (biases under `Full`) are not changed.
        params: the base parameters, for methods that depend on their values.
        rank: the largest rank of an update.
        energy: the share of the squared Frobenius norm of the change to keep in every layer, in (0, 1]: the lowest rank
            that does, at most `rank`.
        tolerance: without `rank` and `energy` the largest error of the decomposition, in the Frobenius norm, relative
            to the norm of the change.

    Returns:
        the new adapter, in float32 or in a wider dtype of the old one, and for every path the relative error, of a
        stack that of its worst layer: 0 if the factors were reused.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if an update is not of low rank and neither a rank nor an energy is given, if an update needs
            `params` and its weight is missing or has another shape, or if a number is out of range.

    Example:
        lora, errors = jlora.to_lora(adapter, params)
        smaller, errors = jlora.to_lora(adapter, params, energy=0.99)
    """
    cut = Cut(rank, energy, tolerance)
    leaves = dict(named_leaves(params))
    out, errors = {}, {}
    for path, update in untie(as_single(adapter)).items():
        update = with_static_scale(path, update)
        is_kept = is_plain(update) and not cut.may_lower(update["a"].shape[-1])
        if is_kept or not is_matrix(update):
            out[path], errors[path] = update, 0.0
        else:
            out[path], errors[path] = lora_of_update(path, update, leaves.get(path), cut)
    return out, errors


def lora_of_update(path: str, update: Update, leaf: Any, cut: Cut) -> tuple[Update, float]:
    """One update of a matrix as a plain LoRA, and the relative error.

    Arguments:
        path: of the weight.
        update: the update.
        leaf: the weight; None if it is not at hand.
        cut: how many ranks are kept.

    Raises:
        ValueError: as `to_lora`.
    """
    change = change_of(path, update, leaf)
    if change.pair:
        pair, scale = change.pair
        rank = pair[0].shape[-1]
        if is_thin(rank, pair[0].shape[-2], pair[1].shape[-1]) and not cut.may_lower(rank):
            return lora_update(pair, scale, update, update.method.dropout), 0.0
    subject = f"the update of {type(update.method).__name__}"
    pair, error = decompose(path, update, change.layer, cut, wide_dtype(update), subject)
    return lora_update(pair, 1.0, update, update.method.dropout), error


def decompose(
    path: str,
    weight: HasAxes,
    layer: Callable[[Index], Layer],
    cut: Cut,
    dtype: DTypeLike,
    subject: str,
    advice: str = "Merge it, or pass a rank or an energy and accept the error.",
) -> tuple[Pair, float]:
    """The truncated decomposition of the change of a weight, and its relative error.

    Arguments:
        path: of the weight.
        weight: its shape and roles.
        layer: the change of one layer.
        cut: how many ranks are kept. If it has neither a rank nor an energy, the result is smaller than the weight.
        dtype: of the result.
        subject: what changes the weight, for the error message.
        advice: what to do if no LoRA is smaller than the weight.

    Raises:
        ValueError: if no LoRA within the tolerance is smaller than the weight, or the change is not finite.
    """
    n_in, n_out = (math.prod(matrix_sizes(weight, side)) for side in ("in", "out"))
    try:
        pair, error = truncated_svd(matrix_sizes(weight, "stack"), layer, cut, dtype)
    except ValueError as reason:
        raise ValueError(f"{path}: {subject} cannot be decomposed, because {reason}.") from reason
    rank = pair[0].shape[-1]
    if not cut.is_given and not is_thin(rank, n_in, n_out):
        raise ValueError(
            f"{path}: {subject} has rank {rank} of at most {min(n_in, n_out)}, so no LoRA is smaller than the weight. "
            f"{advice}"
        )
    return pair, error


def lora_update(pair: Pair, scale: float, weight: HasAxes, dropout: float = 0.0) -> Update:
    """A plain LoRA of a weight.

    Arguments:
        pair: A `(*stack, in, rank)` and B `(*stack, rank, out)`; of rank 0, an update of zeros.
        scale: alpha / rank.
        weight: the shape and roles of the weight.
        dropout: the dropout rate.
    """
    a, b = pair if pair[0].shape[-1] else _one_rank_of_zeros(*pair)
    stack, inner, outer = (matrix_sizes(weight, side) for side in ("stack", "in", "out"))
    rank = a.shape[-1]
    factors = {
        "a": jnp.asarray(a.reshape(*stack, *inner, rank)),
        "b": jnp.asarray(b.reshape(*stack, rank, *outer)),
    }
    return Update(factors, LoRA(rank, scale * rank, dropout=dropout), tuple(weight.roles), tuple(weight.shape))


def _one_rank_of_zeros(a: np.ndarray, b: np.ndarray) -> Pair:
    return np.zeros((*a.shape[:-1], 1), a.dtype), np.zeros((*b.shape[:-2], 1, b.shape[-1]), b.dtype)
