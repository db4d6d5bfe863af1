"""Matrix products: `dot_general` with any dimension numbers, the weight on either side, and `ragged_dot_general`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora._interpreter.context import Context, Role, Value
from jlora._ir import lazy as _deferred
from jlora._ir.algebra import merge_indices
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.materialize import accumulation_dtype, fold_full_rank
from jlora._ir.weight import AdaptedWeight, AxisScale, TensorNetwork, fresh_indices
from jlora._ops import contraction as _contract


def dot_general(ctx: Context, eqn: Any, left: Value, right: Value) -> list[Value] | None:
    if isinstance(left, AdaptedWeight) and isinstance(
        right, AdaptedWeight
    ):  # one is formed: rows of a table, or the left
        left, right = (
            (left, ctx.materialize(eqn, right))
            if right.gathered_axes and not left.gathered_axes
            else (ctx.materialize(eqn, left), right)
        )
    first = isinstance(right, AdaptedWeight)
    x: Any = left if first else right
    f, formed = fold_full_rank(merge_indices(ctx.with_dropout_keys(right if first else left)))
    (x_in, f_in), (x_batch, f_batch) = ((d if first else d[::-1]) for d in eqn.params["dimension_numbers"])
    inner = {c for k in f_in for c in f.axes[k]}
    shared = {c for k in (*f_in, *f_batch) for c in f.axes[k]}
    before = [g for g in f.axis_scales if set(g.indices) & inner and set(g.indices) <= shared]
    after = [g for g in f.axis_scales if not set(g.indices) & inner]
    if len(before) + len(after) < len(f.axis_scales) or (before and not jnp.issubdtype(x.dtype, jnp.floating)):
        return None

    spelled = {k: f.axes[j] for k, j in (*zip(x_in, f_in, strict=True), *zip(x_batch, f_batch, strict=True))}
    x_free = [k for k in range(x.ndim) if k not in spelled]
    for k, c in zip(x_free, fresh_indices([f.used()], len(x_free)), strict=True):
        spelled[k] = c
    letters = "".join(spelled[k] for k in range(x.ndim))
    batch = [spelled[k] for k in x_batch]
    free = [[spelled[k] for k in x_free], [f.axes[j] for j in range(len(f.axes)) if j not in (*f_in, *f_batch)]]
    out = "".join([*batch, *free[not first], *free[first]])
    known = {spelled[k]: x.shape[k] for k in x_free} | {c.name: c.size for c in f.indices}

    narrow = _gained(before, x, letters, known)
    (base,) = _deferred.consume(eqn, *((narrow, f.base) if first else (f.base, narrow)))
    base = _gained(after, base, out, known)
    roles: dict[str, Role] = {}
    for k, axis in enumerate(f.axes):
        roles |= dict.fromkeys(axis, "in" if k in f_in else "stack" if k in f_batch else "out")
    depth = math.prod(f.shape[k] for k in f_in)
    added = f.base.size if formed else 2 * x.size / max(depth, 1) * _width(f)
    ctx.record(eqn, f, roles, factored=not formed, flops=2 * base.size * depth, added=added)

    def branch(x: jax.Array, n: TensorNetwork) -> jax.Array:
        x = x.reshape([known[c] for c in letters])
        y = _contract.apply_network(
            x, letters, n, out, dtype=base.dtype, first=first, precision=eqn.params["precision"]
        )
        return jnp.broadcast_to(y, [known[c] for c in out]).reshape(base.shape)

    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != f.dtype:  # a mixed product is as exact as its wider side
        x = x.astype(max(accumulation_dtype(x.dtype), accumulation_dtype(f.dtype), key=lambda dtype: dtype.itemsize))
    for n in f.networks:
        base = base + under_auto_axes(branch, base)(x, n)
    return [base]


def _gained(gains: list[AxisScale], x: jax.Array, letters: str, sizes: dict[str, int]) -> jax.Array:
    return (
        under_auto_axes(lambda x, gains: _contract.apply_axis_scales(x, letters, sizes, gains), x)(x, gains)
        if gains
        else x
    )


def _width(f: AdaptedWeight) -> int:
    """The FLOPs, halved, of one row through the factors."""
    return sum(a.size for n in f.networks for a in n.factors)


def ragged_dot_general(ctx: Context, eqn: Any, x: Value, f: Value, sizes: Value) -> list[Value] | None:
    """Expert products: rows of `x` in groups, each with a kernel of its own."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (x_in, f_in), (x_batch, f_batch) = dims.dot_dimension_numbers
    groups = tuple(dims.rhs_group_dimensions)
    if isinstance(x, AdaptedWeight) or isinstance(sizes, AdaptedWeight) or len(groups) != 1:
        return None
    free = tuple(k for k in range(x.ndim) if k not in (*x_in, *x_batch))
    if free != tuple(dims.lhs_ragged_dimensions):
        return None
    f, formed = fold_full_rank(merge_indices(ctx.with_dropout_keys(f)))
    group, batch = f.axes[groups[0]], {f.axes[k] for k in f_batch}
    if any(len(axis) > 1 for axis in f.axes) or not all(_carries_groups(n, group, batch) for n in f.networks):
        return None
    row = fresh_indices([f.used()])
    spelled = {k: f.axes[j] for k, j in (*zip(x_in, f_in, strict=True), *zip(x_batch, f_batch, strict=True))}
    letters = "".join(spelled.get(k, row) for k in range(x.ndim))
    rest = [a for k, a in enumerate(f.axes) if k not in (*f_batch, *f_in, *groups)]
    out = "".join([*(spelled[k] for k in x_batch), row, *rest])
    known = {row: x.shape[free[0]]} | {c.name: c.size for c in f.indices}
    gains = [_by_row(g, group, row, sizes, known[row]) for g in f.axis_scales]
    inner = {f.axes[k] for k in f_in}
    before = [g for g in gains if set(g.indices) & inner and set(g.indices) <= set(letters)]
    after = [g for g in gains if not set(g.indices) & inner]
    if len(before) + len(after) < len(gains):
        return None

    (base,) = _deferred.consume(eqn, _gained(before, x, letters, known), f.base, sizes)
    base = _gained(after, base, out, known)
    roles: dict[str, Role] = {
        axis: "in" if k in f_in else "stack" if k in (*groups, *f_batch) else "out" for k, axis in enumerate(f.axes)
    }
    depth = math.prod(f.shape[k] for k in f_in)
    added = f.base.size if formed else 2 * x.size / max(depth, 1) * (_width(f) // max(f.shape[groups[0]], 1))
    ctx.record(eqn, f, roles, factored=not formed, flops=2 * base.size * depth, added=added)

    def branch(x: jax.Array, sizes: jax.Array, n: TensorNetwork) -> jax.Array:
        y = _contract.apply_network(
            x, letters, n, out, dtype=base.dtype, precision=eqn.params["precision"], groups=(group, sizes)
        )
        return jnp.broadcast_to(y, base.shape)

    for n in f.networks:
        base = base + under_auto_axes(branch, base)(x, sizes, n)
    return [base]


def _by_row(gain: AxisScale, group: str, row: str, sizes: jax.Array, rows: int) -> AxisScale:
    """A gain of each expert as one of each row."""
    expert = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=rows)
    return gain.map(group, lambda a, axis: jnp.take(a, expert, axis=axis), row)


def _carries_groups(n: TensorNetwork, group: str, batch: set[str]) -> bool:
    """Whether some factor has the groups, and each that has them has the batch axes, as a ragged product needs."""
    terms = [t for t in n.terms if group in t]
    return bool(terms) and all(batch <= set(t) for t in terms)


RULES = {"dot_general": dot_general, "ragged_dot_general": ragged_dot_general}
