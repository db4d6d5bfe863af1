"""Any update of low rank as a plain LoRA: by its factors, or by a singular value decomposition."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
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


def to_lora(
    adapter: Adapter, params: Any = None, *, rank: int | None = None, tolerance: float = 1e-6
) -> tuple[Adapter, dict[str, float]]:
    """Turns every update into a plain LoRA that adds the same to its weight.

    By the update's own factors where those give a LoRA that is smaller than the weight: the ranks of its networks,
    a subtracted start among them, add up. Else by the singular value decomposition of what it adds.

        W + sum_k s_k A_k B_k  =  W + s [A_1 A_2 ...] [B_1; (s_2 / s) B_2; ...]

    Arguments:
        adapter: the adapter. Updates of what is no matrix (biases under `Full`) stay as they are.
        params: the base parameters, for methods that read them.
        rank: of the decomposition; None takes the least that keeps the error within `tolerance`.
        tolerance: of the decomposition, in the Frobenius norm, relative to the update's.

    Returns:
        the new adapter, and for every path the relative error: 0 where its factors were taken.

    Raises:
        ValueError: where an update has no low rank, or needs `params`.
    """
    leaves = dict(named_leaves(params))
    out, errors = {}, {}
    for path, update in as_single(adapter).items():
        if _is_plain(update) or not {"in", "out"} <= set(map(matrix_side, update.roles)):
            out[path], errors[path] = update, 0.0
            continue
        if update.method.depends_on_weight or update.method.is_multiplicative:
            if path not in leaves:
                name = type(update.method).__name__
                raise ValueError(f"{path}: what {name} adds depends on the base. Pass params, the base parameters.")
            if tuple(leaves[path].shape) != update.shape:
                raise ValueError(f"{path} has shape {leaves[path].shape} in params, the adapter {update.shape}.")
        leaf = as_array(leaves[path]) if path in leaves else np.broadcast_to(np.float32(0), update.shape)
        f = lower_updates([{path: dataclasses.replace(update, key=None)}], leaf, path)
        has_factors = not f.axis_scales and not any(map(f.is_full_rank_network, f.networks))
        pairs = [_by_factors(f, network, update) for network in f.networks] if has_factors else []
        width = sum(a.shape[-1] for a, _ in pairs)
        if pairs and _is_thin(width, update):
            a, b, scale = _side_by_side(pairs, [n.scale for n in f.networks])
            errors[path] = 0.0
        else:
            a, b, errors[path] = _by_svd(path, f, update, rank, tolerance)
            scale = 1.0
        out[path] = _update(a, b, scale, update)
    return out, errors


def _is_plain(update: Update) -> bool:
    is_masked = update.initial or update.rank_mask is not None
    return isinstance(update.method, LoRA) and not is_masked


def _sizes(update: Update, role: str) -> tuple[int, ...]:
    return tuple(n for n, r in zip(update.shape, update.roles, strict=True) if matrix_side(r) == role)


def _is_thin(rank: int, update: Update) -> bool:
    n_in, n_out = math.prod(_sizes(update, "in")), math.prod(_sizes(update, "out"))
    return rank * (n_in + n_out) < n_in * n_out


def _by_factors(f: AdaptedWeight, network: TensorNetwork, update: Update) -> Pair:
    """A network as two matrices, `(*stack, in, rank)` and `(*stack, rank, out)`, of the least rank.

    A factor with letters of both sides goes to one of them, and its letters of the other become a rank.
    """
    labels = group_labels(f, update)
    stack, inner, outer = (labels[group] for group in ("*stack", "*in", "*out"))
    sizes = {x.name: x.size for x in f.indices}
    mixed = [k for k, t in enumerate(network.terms) if set(t) & set(inner) and set(t) & set(outer)]
    best: Pair | None = None
    for sides in itertools.product("io", repeat=len(mixed)):
        left, right = [], []
        for k, (factor, term) in enumerate(zip(network.factors, network.terms, strict=True)):
            is_out = bool(set(term) & set(outer))
            goes_to = sides[mixed.index(k)] if k in mixed else "o" if is_out else "i"
            (right if goes_to == "o" else left).append((np.asarray(factor, np.float32), term))
        left, right = _linked(left, right, outer, f, network, sizes)
        right, left = _linked(right, left, inner, f, network, sizes)
        known = sizes | {c: n for a, t in (*left, *right) for c, n in zip(t, a.shape, strict=True)}
        both = [c for c in known if c not in stack + inner + outer]
        ranks = "".join(c for c in both if any(c in t for _, t in left) and any(c in t for _, t in right))
        if best is None or math.prod(known[c] for c in ranks) < best[0].shape[-1]:
            a = _contract(left, stack, inner + ranks, known)
            b = _contract(right, stack, ranks + outer, known)
            many = tuple(known[c] for c in stack)
            width = math.prod(known[c] for c in ranks)
            best = a.reshape(*many, -1, width), b.reshape(*many, width, -1)
    assert best is not None
    return best


def _linked(
    one: list[tuple[np.ndarray, str]],
    other: list[tuple[np.ndarray, str]],
    foreign: str,
    f: AdaptedWeight,
    network: TensorNetwork,
    sizes: dict[str, int],
) -> tuple[list[tuple[np.ndarray, str]], list[tuple[np.ndarray, str]]]:
    """Both sides, the letters in `one` that belong to the other replaced by ranks that an identity links to them."""
    shared = "".join(c for c in foreign if any(c in t for _, t in one))
    used = [f.used(), *network.terms, *(t for _, t in (*one, *other))]
    table = dict(zip(shared, fresh_indices(used, len(shared)), strict=True))
    renamed = [(a, t.translate(str.maketrans(table))) for a, t in one]
    return renamed, [*other, *((np.eye(sizes[c], dtype=np.float32), table[c] + c) for c in shared)]


def _contract(terms: Sequence[tuple[np.ndarray, str]], stack: str, out: str, sizes: dict[str, int]) -> np.ndarray:
    """The product of some factors over the letters that are wanted, those that none has included."""
    ones = [(np.ones(sizes[c], np.float32), c) for c in stack + out if not any(c in t for _, t in terms)]
    spelled = ",".join(t for _, t in (*terms, *ones))
    return np.einsum(f"{spelled}->{stack + out}", *(a for a, _ in (*terms, *ones)), optimize=True)


def _side_by_side(pairs: Sequence[Pair], scales: Sequence[float]) -> tuple[np.ndarray, np.ndarray, float]:
    unit = scales[0] or 1.0
    ups = [b if s == unit else b * np.float32(s / unit) for (_, b), s in zip(pairs, scales, strict=True)]
    return np.concatenate([a for a, _ in pairs], -1), np.concatenate(ups, -2), unit


def _by_svd(
    path: str, f: AdaptedWeight, update: Update, rank: int | None, tolerance: float
) -> tuple[np.ndarray, np.ndarray, float]:
    dtype = accumulation_dtype(f.dtype)
    base = materialize(f.base).astype(dtype)
    added = delta(f, dtype)
    for k in range(len(f.axis_scales)):
        before = math.prod((broadcast_axis_scale(s, f, dtype) for s in f.axis_scales[:k]), start=base)
        added = added + before * (broadcast_axis_scale(f.axis_scales[k], f, dtype) - 1)
    whole = np.asarray(as_matrix(jnp.asarray(added), update.roles), np.float64)
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    energy = np.square(s).sum(-1, keepdims=True)
    left = np.sqrt(np.cumsum(np.square(s)[..., ::-1], -1)[..., ::-1] / np.where(energy == 0, 1, energy))
    worst = np.append(left.reshape(-1, left.shape[-1]).max(0)[1:], 0.0)  # the error of every rank from 1 on
    least = int(np.argmax(worst <= tolerance)) + 1
    if rank is None and not _is_thin(least, update):
        raise ValueError(
            f"{path}: what {type(update.method).__name__} adds has rank {least} of at most {len(worst)}, so no LoRA is "
            "smaller than the weight. Merge it, or give a rank and accept the error."
        )
    keep = min(rank or least, len(worst))
    root = np.sqrt(s[..., :keep])
    a, b = u[..., :keep] * root[..., None, :], root[..., None] * vt[..., :keep, :]
    return a.astype(np.float32), b.astype(np.float32), float(worst[keep - 1])


def _update(a: np.ndarray, b: np.ndarray, scale: float, update: Update) -> Update:
    stack, inner, outer = (_sizes(update, role) for role in ("stack", "in", "out"))
    rank = a.shape[-1]
    factors = {
        "a": jnp.asarray(a.reshape(*stack, *inner, rank)),
        "b": jnp.asarray(b.reshape(*stack, rank, *outer)),
    }
    method = LoRA(rank, scale * rank, dropout=update.method.dropout)
    return Update(factors, method, update.roles, update.shape)
