"""Converts updates of low rank to plain LoRA: from their factors, or by a singular value decomposition."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._interpreter.context import matrix_side
from jlora._ir.lazy import materialize
from jlora._ir.materialize import accumulation_dtype, broadcast_axis_scale, delta
from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices
from jlora._tree.leaves import as_array
from jlora._tree.paths import named_leaves
from jlora.methods._base import Adapter, Update
from jlora.methods._common.matrices import as_matrix
from jlora.methods._common.networks import group_labels
from jlora.methods._lowering import as_single, lower_updates
from jlora.methods.lora import LoRA

Pair = tuple[np.ndarray, np.ndarray]
Terms = list[tuple[np.ndarray, str]]  # factors, each with the indices of its axes


def to_lora(
    adapter: Adapter, params: Any = None, *, rank: int | None = None, tolerance: float = 1e-6
) -> tuple[Adapter, dict[str, float]]:
    """Converts every update to a plain LoRA that adds the same matrix to its weight.

    If the factors of the update give a LoRA that is smaller than the weight, they are reused: the ranks of its
    networks, a subtracted start included, are summed. Otherwise the change of the weight is decomposed by an SVD.

        W + sum_k s_k A_k B_k  =  W + s [A_1 A_2 ...] [B_1; (s_2 / s) B_2; ...]

    Arguments:
        adapter: the adapter. Updates of weights that are not matrices (biases under `Full`) are not changed.
        params: the base parameters, for methods that depend on their values.
        rank: the rank of the decomposition; None takes the lowest one that keeps the error within `tolerance`.
        tolerance: the largest error of the decomposition, in the Frobenius norm, relative to the norm of the change.

    Returns:
        the new adapter, and for every path the relative error: 0 if its factors were reused.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if an update is not of low rank, or needs `params` and its weight is missing or has another shape.

    Example:
        lora, errors = jlora.to_lora(adapter, params)
    """
    leaves = dict(named_leaves(params))
    out, errors = {}, {}
    for path, update in as_single(adapter).items():
        if _is_plain(update) or not {"in", "out"} <= set(map(matrix_side, update.roles)):
            out[path], errors[path] = update, 0.0
            continue
        if update.method.depends_on_weight or update.method.is_multiplicative:
            _check_weight(path, update, leaves.get(path))
        leaf = as_array(leaves[path]) if path in leaves else np.broadcast_to(np.float32(0), update.shape)
        w = lower_updates([{path: dataclasses.replace(update, key=None)}], leaf, path)
        has_factors = not w.axis_scales and not any(map(w.is_full_rank_network, w.networks))
        pairs = [_by_factors(w, network, update) for network in w.networks] if has_factors else []
        total_rank = sum(a.shape[-1] for a, _ in pairs)
        if pairs and _is_thin(total_rank, update):
            a, b, scale = _concatenate_pairs(pairs, [network.scale for network in w.networks])
            errors[path] = 0.0
        else:
            a, b, errors[path] = _by_svd(path, w, update, rank, tolerance)
            scale = 1.0
        out[path] = _update(a, b, scale, update)
    return out, errors


def _check_weight(path: str, update: Update, leaf: Any) -> None:
    if leaf is None:
        name = type(update.method).__name__
        raise ValueError(f"{path}: the update of {name} depends on the base. Pass params, the base parameters.")
    if tuple(leaf.shape) != update.shape:
        raise ValueError(
            f"{path} has shape {tuple(leaf.shape)} in params, but the adapter was initialised for {update.shape}. Pass "
            "the base parameters of this adapter."
        )


def _is_plain(update: Update) -> bool:
    is_masked = update.initial or update.rank_mask is not None
    return isinstance(update.method, LoRA) and not is_masked


def _sizes(update: Update, role: str) -> tuple[int, ...]:
    return tuple(n for n, r in zip(update.shape, update.roles, strict=True) if matrix_side(r) == role)


def _is_thin(rank: int, update: Update) -> bool:
    """Whether a LoRA of this rank has fewer numbers than the weight."""
    n_in, n_out = math.prod(_sizes(update, "in")), math.prod(_sizes(update, "out"))
    return rank * (n_in + n_out) < n_in * n_out


def _by_factors(w: AdaptedWeight, network: TensorNetwork, update: Update) -> Pair:
    """A network as two matrices, `(*stack, in, rank)` and `(*stack, rank, out)`, of the lowest rank.

    Each factor becomes a part of A or of B. A factor with in and out indices can be on either side: all choices are
    compared.
    """
    labels = group_labels(w, update)
    inner, outer = set(labels["*in"]), set(labels["*out"])
    terms = [(np.asarray(a, np.float32), term) for a, term in zip(network.factors, network.terms, strict=True)]
    mixed = [k for k, (_, term) in enumerate(terms) if inner & set(term) and outer & set(term)]
    choices = (dict(zip(mixed, sides, strict=True)) for sides in itertools.product(("in", "out"), repeat=len(mixed)))
    divisions = [_divide(w, terms, labels, choice) for choice in choices]
    a_terms, b_terms = min(divisions, key=lambda division: _rank(division, labels))
    return _as_pair(w, a_terms, b_terms, labels)


def _divide(
    w: AdaptedWeight, terms: Terms, labels: Mapping[str, str], side_of_mixed: Mapping[int, str]
) -> tuple[Terms, Terms]:
    """Divides factors into those of A and those of B; `side_of_mixed` has the side of each that could be on both."""
    a_terms, b_terms = [], []
    for k, (factor, term) in enumerate(terms):
        side = side_of_mixed.get(k) or ("out" if set(labels["*out"]) & set(term) else "in")
        (b_terms if side == "out" else a_terms).append((factor, term))
    a_terms, b_terms = _replace_indices(w, a_terms, b_terms, labels["*out"])
    b_terms, a_terms = _replace_indices(w, b_terms, a_terms, labels["*in"])
    return a_terms, b_terms


def _replace_indices(w: AdaptedWeight, terms: Terms, others: Terms, indices: str) -> tuple[Terms, Terms]:
    """Replaces the indices of the other side by rank indices; an identity on the other side links the two."""
    replaced = "".join(index for index in indices if any(index in term for _, term in terms))
    used = [w.used(), *(term for _, term in (*terms, *others))]
    ranks = dict(zip(replaced, fresh_indices(used, len(replaced)), strict=True))
    identities = [(np.eye(w.size(index), dtype=np.float32), rank + index) for index, rank in ranks.items()]
    return [(a, term.translate(str.maketrans(ranks))) for a, term in terms], [*others, *identities]


def _rank_indices(division: tuple[Terms, Terms], labels: Mapping[str, str]) -> dict[str, int]:
    """The indices that A and B share, with their sizes; those of the weight are not among them."""
    a_sizes, b_sizes = ({i: n for a, term in terms for i, n in zip(term, a.shape, strict=True)} for terms in division)
    weight_indices = labels["*stack"] + labels["*in"] + labels["*out"]
    return {index: n for index, n in a_sizes.items() if index in b_sizes and index not in weight_indices}


def _rank(division: tuple[Terms, Terms], labels: Mapping[str, str]) -> int:
    return math.prod(_rank_indices(division, labels).values())


def _as_pair(w: AdaptedWeight, a_terms: Terms, b_terms: Terms, labels: Mapping[str, str]) -> Pair:
    """The matrices A and B: the products of the factors of each side."""
    stack, ranks = labels["*stack"], _rank_indices((a_terms, b_terms), labels)
    sizes, names = w.sizes | ranks, "".join(ranks)
    shape, rank = [sizes[index] for index in stack], math.prod(ranks.values())
    a = _contract(a_terms, stack + labels["*in"] + names, sizes)
    b = _contract(b_terms, stack + names + labels["*out"], sizes)
    return a.reshape(*shape, -1, rank), b.reshape(*shape, rank, -1)


def _contract(terms: Terms, out: str, sizes: Mapping[str, int]) -> np.ndarray:
    """The product of factors, with the axes `out`; along an index that no factor has it is constant."""
    missing = [index for index in out if not any(index in term for _, term in terms)]
    operands = [*terms, *((np.ones(sizes[index], np.float32), index) for index in missing)]
    equation = ",".join(term for _, term in operands) + "->" + out
    return np.einsum(equation, *(a for a, _ in operands), optimize=True)


def _concatenate_pairs(pairs: Sequence[Pair], scales: Sequence[float]) -> tuple[np.ndarray, np.ndarray, float]:
    """One pair with all ranks, and its scale: that of the first pair; the other Bs are multiplied by their ratio."""
    unit = scales[0] or 1.0
    ups = [b if s == unit else b * np.float32(s / unit) for (_, b), s in zip(pairs, scales, strict=True)]
    return np.concatenate([a for a, _ in pairs], -1), np.concatenate(ups, -2), unit


def _by_svd(
    path: str, w: AdaptedWeight, update: Update, rank: int | None, tolerance: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """A, B and the relative error of the truncated singular value decomposition of the change, the worst of a stack."""
    dtype = accumulation_dtype(w.dtype)
    base = materialize(w.base).astype(dtype)
    change = delta(w, dtype)
    for k in range(len(w.axis_scales)):
        before = math.prod((broadcast_axis_scale(s, w, dtype) for s in w.axis_scales[:k]), start=base)
        change = change + before * (broadcast_axis_scale(w.axis_scales[k], w, dtype) - 1)
    matrix = np.asarray(as_matrix(jnp.asarray(change), update.roles), np.float64)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    energy = np.square(s).sum(-1, keepdims=True)
    tails = np.sqrt(np.cumsum(np.square(s)[..., ::-1], -1)[..., ::-1] / np.where(energy == 0, 1, energy))
    errors = np.append(tails.reshape(-1, tails.shape[-1]).max(0)[1:], 0.0)  # of the ranks 1, 2, ...
    lowest = int(np.argmax(errors <= tolerance)) + 1
    if rank is None and not _is_thin(lowest, update):
        raise ValueError(
            f"{path}: the update of {type(update.method).__name__} has rank {lowest} of at most {len(errors)}, so no "
            "LoRA is smaller than the weight. Merge it, or pass a rank and accept the error."
        )
    rank = min(rank or lowest, len(errors))
    root = np.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
    return a.astype(np.float32), b.astype(np.float32), float(errors[rank - 1])


def _update(a: np.ndarray, b: np.ndarray, scale: float, update: Update) -> Update:
    stack, inner, outer = (_sizes(update, role) for role in ("stack", "in", "out"))
    rank = a.shape[-1]
    factors = {
        "a": jnp.asarray(a.reshape(*stack, *inner, rank)),
        "b": jnp.asarray(b.reshape(*stack, rank, *outer)),
    }
    method = LoRA(rank, scale * rank, dropout=update.method.dropout)
    return Update(factors, method, update.roles, update.shape)
