"""Tensor networks as two thin matrices: the factors are divided into those of A and those of B."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jlora._adapter.svd import Pair
from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices

Terms = list[tuple[np.ndarray, str]]  # factors, each with the indices of its axes


def by_factors(w: AdaptedWeight, network: TensorNetwork, labels: Mapping[str, str]) -> Pair:
    """A network as two matrices, `(*stack, in, rank)` and `(*stack, rank, out)`, of the lowest rank, at least float32.

    Each factor becomes a part of A or of B. A factor with in and out indices can be on either side: all choices are
    compared.

    Arguments:
        w: the weight that has the network.
        network: the network, not as large as the weight.
        labels: the indices of every group of axes.
    """
    inner, outer = set(labels["*in"]), set(labels["*out"])
    dtype = np.result_type(np.float32, *(a.dtype for a in network.factors))
    terms = [(np.asarray(a, dtype), term) for a, term in zip(network.factors, network.terms, strict=True)]
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
    dtype = (terms or others)[0][0].dtype
    identities = [(np.eye(w.size(index), dtype=dtype), rank + index) for index, rank in ranks.items()]
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
    a = contract(a_terms, stack + labels["*in"] + names, sizes)
    b = contract(b_terms, stack + names + labels["*out"], sizes)
    return a.reshape(*shape, -1, rank), b.reshape(*shape, rank, -1)


def contract(terms: Sequence[tuple[np.ndarray, str]], out: str, sizes: Mapping[str, int]) -> np.ndarray:
    """The product of factors, with the axes `out`; along an index that no factor has it is constant.

    Arguments:
        terms: the factors, each with the indices of its axes, in one dtype.
        out: the indices of the result; all others are summed over.
        sizes: the size of every index in `out`.
    """
    missing = [index for index in out if not any(index in term for _, term in terms)]
    operands = [*terms, *((np.ones(sizes[index], terms[0][0].dtype), index) for index in missing)]
    equation = ",".join(term for _, term in operands) + "->" + out
    return np.einsum(equation, *(a for a, _ in operands), optimize=True)
