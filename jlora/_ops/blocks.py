"""Block-diagonal factors as matrices with zeros, for products without a batch axis."""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp

from jlora._ir.algebra import align_axes
from jlora._ir.weight import AdaptedWeight, TensorNetwork, fresh_indices


def with_zero_blocks(f: AdaptedWeight, inputs: Collection[str], outputs: Collection[str]) -> AdaptedWeight:
    """The same weight; factors that are block-diagonal along a part of one side (BD-LoRA) become matrices with zeros.

    With the terms icp and cpo the product is (x A) C, where C(c' p, c o) is B(c, p, o) if c' is c, and else 0. It takes
    as many FLOPs as a LoRA of that rank. XLA copies and transposes activations for a product with a batch axis.

    Arguments:
        f: the weight; networks that have `in_parts` are changed.
        inputs, outputs: the indices of both sides.
    """
    networks = (_without_blocks(n, f, inputs, outputs) if n.in_parts else n for n in f.networks)
    return dataclasses.replace(f, networks=tuple(networks))


def _without_blocks(
    n: TensorNetwork, f: AdaptedWeight, inputs: Collection[str], outputs: Collection[str]
) -> TensorNetwork:
    for side in (inputs, outputs):
        for block in side:
            having = [k for k, term in enumerate(n.terms) if block in term]
            # Factors of blocks share the rank, too. A multiplier of one side shares nothing else.
            if len(having) == 2 and len(set.intersection(*(set(n.terms[k]) for k in having))) > 1:
                n = _spread(n, f, block, having, side)
    return n


def _spread(n: TensorNetwork, f: AdaptedWeight, block: str, having: list[int], side: Collection[str]) -> TensorNetwork:
    """The network in which the factor of a side gets a second index for its blocks, and the other factor this alone."""
    summed, terms, factors = fresh_indices([f.used(), *n.terms]), list(n.terms), list(n.factors)
    at = next((k for k in having if set(terms[k]) & set(side) - {block}), having[-1])
    (other,) = (k for k in having if k != at)
    of_side = [c for c in terms[at] if c in side]
    term = "".join([*of_side, summed, *(c for c in terms[at] if c not in of_side)])
    places = jnp.eye(f.size(block), dtype=factors[at].dtype)
    factors[at] = align_axes(factors[at], terms[at], term) * align_axes(places, summed + block, term)
    terms[at], terms[other] = term, terms[other].replace(block, summed)
    return dataclasses.replace(n, factors=tuple(factors), terms=tuple(terms))
