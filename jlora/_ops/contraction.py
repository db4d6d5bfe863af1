"""Products of an activation with a network, one factor at a time: the order that never materialises the weight."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora._ir.algebra import align_axes
from jlora._ir.sizes import is_static
from jlora._ir.weight import TensorNetwork
from jlora._ops.chains import contract_by_rows
from jlora._ops.draws import apply_dropout, draw_latent
from jlora._ops.pair_products import Factor, Groups, contract_pair


def apply_network(
    x: jax.Array,
    labels: str,
    network: TensorNetwork,
    out: str,
    *,
    dtype: jnp.dtype,
    first: bool = True,
    precision: Any = None,
    groups: Groups | None = None,
) -> jax.Array:
    """`scale * einsum(x, factors -> out)`: the activation is multiplied by one factor after the other.

    Arguments:
        x: the activation.
        labels: one index for every axis of `x`. Indices that are not in `out` are contracted.
        network: the network.
        out: the indices of the result, in order. Those that neither `x` nor a factor has get an axis of size one.
        dtype: of the result. Factors are cast to the dtype of `x` before they are used.
        first: whether `x` is the left operand, so that its free axes are before those of the factors.
        precision: as in `jax.lax.dot_general`.
        groups: of a ragged product.
    """
    x = apply_dropout(x, labels, network)
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else dtype
    x = x.astype(compute)
    kept = out + (groups.name if groups else "")
    # Every row has its group, so the order treats the groups as an index of the activation.
    ordered = _order(_absorb_vectors(network), labels + kept[len(out) :], out)
    factors = _cast_and_scale(ordered, network.scale, compute)
    is_first = not network.latent
    if network.latent:
        (now,) = (factor for factor in factors if network.latent in factor[1])
        factors = [factor for factor in factors if factor is not now]
        later = kept + network.latent + "".join(term for _, term in factors)
        x, labels = contract_pair(
            x, labels, *now, later, dtype=compute, first=first, precision=precision, groups=groups
        )
        x, labels = draw_latent(x, labels, network)
    options: Any = {"first": first, "precision": precision}
    while factors:
        x, count, over = x if is_first else name_intermediate(x), 0, "" if is_first else "x"
        if not groups:
            x, labels, count = contract_by_rows(x, labels, factors, out, over=over, dtype=dtype, **options)
        if not count:
            later = kept + "".join(term for _, term in factors[1:])
            now = {"groups": groups, "dtype": compute if factors[1:] else dtype}
            x, labels = contract_pair(x, labels, *factors[0], later, **now, **options)
        factors, is_first = factors[count or 1 :], False
    return align_axes(x.astype(dtype), labels, out)


def network_flops(labels: str, network: TensorNetwork, out: str, sizes: Mapping[str, Any]) -> Any:
    """The FLOPs of `apply_network` in products, in the order that it takes.

    Arguments:
        labels, network, out: as there; of a ragged product both have the index of the groups, of which a row meets one.
        sizes: of all indices that the network does not have alone.
    """
    pairs = list(zip(network.factors, network.terms, strict=True))
    sizes = {c: size for factor, term in pairs for c, size in zip(term, factor.shape, strict=True)} | dict(sizes)
    ordered = _order([pair for pair in pairs if not any(set(pair[1]) < set(term) for _, term in pairs)], labels, out)
    present, flops = set(labels), 0
    for k, (_, term) in enumerate(ordered):
        present |= set(term)
        flops += 2 * math.prod(sizes[c] for c in present)
        present &= set(out).union(*(later for _, later in ordered[k + 1 :]))
    return flops


def _cast_and_scale(factors: list[Factor], scale: float, dtype: jnp.dtype) -> list[Factor]:
    """Casts the factors; the scale multiplies the first one, before the cast."""
    if factors and scale != 1:
        (factor, term), *rest = factors
        factors = [(factor * jnp.asarray(scale, factor.dtype), term), *rest]
    return [(factor.astype(dtype), term) for factor, term in factors]


def name_intermediate(x: jax.Array) -> jax.Array:
    """The activation between two factors, with the name "jlora" for policies of `jax.checkpoint`."""
    return checkpoint_name(x, "jlora")


def _absorb_vectors(network: TensorNetwork) -> list[Factor]:
    """Multiplies each factor into one that has all its indices: a product of small arrays, not of activations."""
    factors = zip(network.factors, network.terms, strict=True)
    absorbed: list[Factor] = []
    for factor, term in sorted(factors, key=lambda item: -len(item[1])):
        at = next((k for k, (_, other) in enumerate(absorbed) if set(term) <= set(other)), None)
        if at is None:
            absorbed.append((factor, term))
        else:
            other, other_term = absorbed[at]
            wider = max(other.dtype, factor.dtype, key=lambda dtype: dtype.itemsize)
            absorbed[at] = (other.astype(wider) * align_axes(factor.astype(wider), term, other_term), other_term)
    return absorbed


def _order(factors: list[Factor], labels: str, out: str) -> list[Factor]:
    """The order in which the activation is multiplied by the factors.

    Factors that contract an index of the activation, or that have no other indices, come first. Among those the next is
    the one by which the activation grows least.
    """
    remaining, ordered, present = list(factors), [], set(labels)

    def cost(item: Factor) -> tuple[bool, float]:
        factor, term = item
        others = set(out).union(*(t for _, t in remaining if t is not term))
        contracts = bool((set(term) & present) - others)
        return not (contracts or set(term) <= present), _growth(factor, term, present)

    while remaining:
        best = min(remaining, key=cost)
        remaining = [item for item in remaining if item is not best]
        present |= set(best[1])
        ordered.append(best)
    return ordered


def _growth(factor: jax.Array, term: str, present: set[str]) -> float:
    """By how much an activation with the indices `present` grows when it is multiplied by a factor.

    Axes of symbolic size are those of a batch, which no factor changes.
    """
    sizes = {c: n for c, n in zip(term, factor.shape, strict=True) if is_static(n)}
    return math.prod(n for c, n in sizes.items() if c not in present) / math.prod(
        n for c, n in sizes.items() if c in present
    )
