"""Products of an activation with a network, one factor at a time: the order that never materialises the weight."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jlora._ir.algebra import align_axes
from jlora._ir.sizes import is_static
from jlora._ir.weight import TensorNetwork
from jlora._ops.chained_matmul import chained_matmul
from jlora._ops.draws import apply_dropout, draw_latent
from jlora._ops.matmul import rank_matmul

Factor = tuple[jax.Array, str]  # an array and the indices of its axes


class Groups(NamedTuple):
    """The groups of a ragged product: the name of their index, that of the rows, and how many rows each group has."""

    name: str
    row: str
    sizes: jax.Array


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
        options = {"dtype": compute, "first": first, "precision": precision}
        x, labels = contract_pair(x, labels, *now, later, groups=groups, **options)
        x, labels = draw_latent(x, labels, network)
    while factors:
        x = x if is_first else name_intermediate(x)
        chained = not is_first and not groups and _is_chain(labels, factors, out)
        now, factors, is_first = factors[: 1 + chained], factors[1 + chained :], False
        later = kept + "".join(term for _, term in factors)
        options: Any = {"dtype": compute if factors else dtype, "first": first, "precision": precision}
        if chained:
            (c, c_term), (b, b_term) = now
            reached = "".join(name for name in labels + c_term + b_term if name in later)
            x, labels = chained_matmul(x, c, b, (labels, c_term, b_term, reached), **options), reached
        else:
            x, labels = contract_pair(x, labels, *now[0], later, groups=groups, **options)
    return align_axes(x.astype(dtype), labels, out)


def _cast_and_scale(factors: list[Factor], scale: float, dtype: jnp.dtype) -> list[Factor]:
    """Casts the factors; the scale multiplies the first one, before the cast."""
    if factors and scale != 1:
        (factor, term), *rest = factors
        factors = [(factor * jnp.asarray(scale, factor.dtype), term), *rest]
    return [(factor.astype(dtype), term) for factor, term in factors]


def _is_chain(labels: str, factors: Sequence[Factor], out: str) -> bool:
    """Whether the next two factors share no index, the first is a matrix, and each contracts all it shares with `x`."""
    terms = [term for _, term in factors]
    if len(terms) < 2 or len(terms[0]) != 2 or set(terms[0]) & set(terms[1]):
        return False
    present, later = set(labels), set(out).union(*terms[2:])
    contracted = [present & set(term) for term in terms[:2]]
    new = set(terms[0] + terms[1]) - present
    if not all(contracted) or len(contracted[0]) != 1:
        return False
    return not (contracted[0] | contracted[1]) & later and new <= later


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


@dataclasses.dataclass(frozen=True)
class _PairLabels:
    """The indices that two arrays share, and those that one of them has alone.

    Arguments:
        batch: shared, and kept in the result.
        contracted: shared, and summed.
        x_free, t_free: of one array alone.
    """

    batch: str
    contracted: str
    x_free: str
    t_free: str


def _label_pair(xs: str, ts: str, keep: str) -> _PairLabels:
    shared = [c for c in xs if c in ts]
    return _PairLabels(
        batch="".join(c for c in shared if c in keep),
        contracted="".join(c for c in shared if c not in keep),
        x_free="".join(c for c in xs if c not in shared),
        t_free="".join(c for c in ts if c not in shared),
    )


def contract_pair(
    x: jax.Array,
    xs: str,
    t: jax.Array,
    ts: str,
    keep: str,
    *,
    dtype: jnp.dtype,
    first: bool = True,
    precision: Any = None,
    groups: Groups | None = None,
) -> Factor:
    """One product of two labelled arrays.

    Arguments:
        x, xs: the activation and its indices.
        t, ts: the factor and its indices.
        keep: shared indices in `keep` are batched, the others are contracted.
        dtype, first, precision, groups: as for `apply_network`.

    Returns:
        the product and its indices.
    """
    t, ts = _sum_lone(t, ts, xs + keep)
    x, xs = _sum_lone(x, xs, ts + keep)
    if groups and groups.name in ts:
        if _label_pair(xs, ts, keep).contracted:
            return _contract_ragged(x, xs, t, ts, keep, groups, dtype=dtype, precision=precision)
        t, ts = by_row(t, ts, groups, x.shape[xs.index(groups.row)])
    pair = _label_pair(xs, ts, keep)
    if not pair.contracted and not pair.t_free:
        return x * align_axes(t, ts, xs), xs
    left, right, free = ((x, xs), (t, ts), pair.x_free + pair.t_free)
    if not first:
        left, right, free = ((t, ts), (x, xs), pair.t_free + pair.x_free)
    contracted, batch = (_axes(names, left[1], right[1]) for names in (pair.contracted, pair.batch))
    if pair.batch:
        y = lax.dot_general(left[0], right[0], (contracted, batch), precision=precision, preferred_element_type=dtype)
    else:
        y = rank_matmul(left[0], right[0], contracted, precision=precision, dtype=dtype)
    return y, pair.batch + free


def _axes(names: str, *terms: str) -> Any:
    """For each of the arrays the axes of some indices."""
    return tuple(tuple(map(term.index, names)) for term in terms)


def _sum_lone(x: jax.Array, labels: str, keep: str) -> Factor:
    """Sums the axes whose index nothing else has."""
    lone = tuple(k for k, c in enumerate(labels) if c not in keep)
    return (x.sum(lone), "".join(c for c in labels if c in keep)) if lone else (x, labels)


def by_row(t: jax.Array, ts: str, groups: Groups, rows: int) -> Factor:
    """The entries of a factor `t` with the indices `ts` for the group of every row; zero after the last group."""
    group = jnp.repeat(jnp.arange(len(groups.sizes)), groups.sizes, total_repeat_length=rows)
    axis = ts.index(groups.name)
    is_in_group = align_axes(jnp.arange(rows) < groups.sizes.sum(), groups.row, ts.replace(groups.name, groups.row))
    by_row = jnp.take(t, group, axis=axis)
    return jnp.where(is_in_group, by_row, jnp.zeros((), t.dtype)), ts.replace(groups.name, groups.row)


def _contract_ragged(
    x: jax.Array, xs: str, t: jax.Array, ts: str, keep: str, groups: Groups, *, dtype: jnp.dtype, precision: Any
) -> Factor:
    """A ragged product. Free axes of the activation beside the rows are a part of the rows."""
    pair = _label_pair(xs, ts, keep)
    rest = pair.x_free.replace(groups.row, "")
    order = pair.batch + groups.row + rest + pair.contracted
    x = x.transpose([xs.index(c) for c in order])
    sizes = dict(zip(order, x.shape, strict=True))
    width = math.prod(sizes[c] for c in rest)
    x = x.reshape([*(sizes[c] for c in pair.batch), sizes[groups.row] * width, *(sizes[c] for c in pair.contracted)])
    xs = pair.batch + groups.row + pair.contracted
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(_axes(pair.contracted, xs, ts), _axes(pair.batch, xs, ts)),
        lhs_ragged_dimensions=[xs.index(groups.row)],
        rhs_group_dimensions=[ts.index(groups.name)],
    )
    y = lax.ragged_dot_general(x, t, groups.sizes * width, dims, precision=precision, preferred_element_type=dtype)
    free = y.shape[len(pair.batch) + 1 :]
    y = y.reshape([*(sizes[c] for c in pair.batch + groups.row + rest), *free])
    return y, pair.batch + groups.row + rest + pair.t_free.replace(groups.name, "")
