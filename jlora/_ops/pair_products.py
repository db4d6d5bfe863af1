"""One product of two labelled arrays, of which one may be a factor of the groups of a ragged product."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora._ir.algebra import align_axes
from jlora._ops.matmul import rank_matmul

Factor = tuple[jax.Array, str]  # an array and the indices of its axes


class Groups(NamedTuple):
    """The groups of a ragged product: the name of their index, that of the rows, and how many rows each group has."""

    name: str
    row: str
    sizes: jax.Array


@dataclasses.dataclass(frozen=True)
class PairLabels:
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


def label_pair(xs: str, ts: str, keep: str) -> PairLabels:
    """How the indices of two arrays take part in their product, which keeps shared ones that are in `keep`."""
    shared = [c for c in xs if c in ts]
    return PairLabels(
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
        if label_pair(xs, ts, keep).contracted:
            return _contract_ragged(x, xs, t, ts, keep, groups, dtype=dtype, precision=precision)
        t, ts = by_row(t, ts, groups, x.shape[xs.index(groups.row)])
    pair = label_pair(xs, ts, keep)
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
    pair = label_pair(xs, ts, keep)
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
