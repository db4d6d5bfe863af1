"""Matrix products: `dot_general` with any dimension numbers, the weight on either side, and `ragged_dot_general`."""

import math
from typing import Any

import jax.numpy as jnp

from jlora import _compat, _contract
from jlora._context import Context, Role, Value
from jlora._factored import Factored, Network, fresh, unify, widened


def dot_general(ctx: Context, eqn: Any, left: Value, right: Value) -> list[Value]:
    if isinstance(left, Factored) and isinstance(right, Factored):  # one is formed: rows of a table, or the left
        left, right = (left, ctx.form(eqn, right)) if right.read and not left.read else (ctx.form(eqn, left), right)
    first = isinstance(right, Factored)
    x: Any = left if first else right
    f = unify(ctx.drop(right if first else left))
    (x_in, f_in), (x_batch, f_batch) = ((d if first else d[::-1]) for d in eqn.params["dimension_numbers"])
    (base,) = _compat.bind(eqn, *((x, f.base) if first else (f.base, x)))

    roles: dict[str, Role] = {}
    for k, axis in enumerate(f.axes):
        roles |= dict.fromkeys(axis, "in" if k in f_in else "stack" if k in f_batch else "out")
    inner = math.prod(f.shape[k] for k in f_in)
    ctx.record(eqn, f, roles, flops=2 * base.size * inner, added=2 * x.size / max(inner, 1) * _width(f))
    if not f.networks:
        return [base]

    spelled = {k: f.axes[j] for k, j in (*zip(x_in, f_in, strict=True), *zip(x_batch, f_batch, strict=True))}
    x_free = [k for k in range(x.ndim) if k not in spelled]
    for k, c in zip(x_free, fresh([f.used()], len(x_free)), strict=True):
        spelled[k] = c
    letters = "".join(spelled[k] for k in range(x.ndim))
    sizes = [
        n for k in range(x.ndim) for n in ([f.letter(c).size for c in spelled[k]] if k not in x_free else [x.shape[k]])
    ]
    batch = [spelled[k] for k in x_batch]
    free = [[spelled[k] for k in x_free], [f.axes[j] for j in range(len(f.axes)) if j not in (*f_in, *f_batch)]]
    out = "".join([*batch, *free[not first], *free[first]])
    known = {**dict(zip(letters, sizes, strict=True)), **{c.name: c.size for c in f.letters}}
    x = x.reshape(sizes)
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != f.dtype:  # a mixed product is as exact as its wider side
        x = x.astype(max(widened(x.dtype), widened(f.dtype), key=lambda dtype: dtype.itemsize))
    for n in f.networks:
        y = _contract.apply(x, letters, n, out, dtype=base.dtype, first=first, precision=eqn.params["precision"])
        if y.shape != base.shape:
            y = jnp.broadcast_to(y, [known[c] for c in out]).reshape(base.shape)
        base = base + y
    return [base]


def _width(f: Factored) -> int:
    """The FLOPs, halved, of one row through the factors."""
    return sum(a.size for n in f.networks for a in n.factors)


def ragged_dot_general(ctx: Context, eqn: Any, x: Value, f: Value, sizes: Value) -> list[Value] | None:
    """Expert products: rows of `x` in groups, each with a kernel of its own."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (x_in, f_in), (x_batch, f_batch) = dims.dot_dimension_numbers
    groups = tuple(dims.rhs_group_dimensions)
    if isinstance(x, Factored) or isinstance(sizes, Factored) or len(groups) != 1:
        return None
    free = tuple(k for k in range(x.ndim) if k not in (*x_in, *x_batch))
    if free != tuple(dims.lhs_ragged_dimensions):
        return None
    f = unify(ctx.drop(f))
    group, batch = f.axes[groups[0]], {f.axes[k] for k in f_batch}
    if any(len(axis) > 1 for axis in f.axes) or not all(_carries_groups(n, group, batch) for n in f.networks):
        return None
    (base,) = _compat.bind(eqn, x, f.base, sizes)
    roles: dict[str, Role] = {
        axis: "in" if k in f_in else "stack" if k in (*groups, *f_batch) else "out" for k, axis in enumerate(f.axes)
    }
    inner = math.prod(f.shape[k] for k in f_in)
    width = _width(f) // max(f.shape[groups[0]], 1)
    ctx.record(eqn, f, roles, flops=2 * base.size * inner, added=2 * x.size / max(inner, 1) * width)
    if not f.networks:
        return [base]
    row = fresh([f.used()])
    spelled = {k: f.axes[j] for k, j in (*zip(x_in, f_in, strict=True), *zip(x_batch, f_batch, strict=True))}
    letters = "".join(spelled.get(k, row) for k in range(x.ndim))
    rest = [a for k, a in enumerate(f.axes) if k not in (*f_batch, *f_in, *groups)]
    out = "".join([*(spelled[k] for k in x_batch), row, *rest])
    for n in f.networks:
        y = _contract.apply(
            x, letters, n, out, dtype=base.dtype, precision=eqn.params["precision"], groups=(group, sizes)
        )
        base = base + jnp.broadcast_to(y, base.shape)
    return [base]


def _carries_groups(n: Network, group: str, batch: set[str]) -> bool:
    """Whether some factor has the groups, and each that has them has the batch axes, as a ragged product needs."""
    terms = [t for t in n.terms if group in t]
    return bool(terms) and all(batch <= set(t) for t in terms)


RULES = {"dot_general": dot_general, "ragged_dot_general": ragged_dot_general}
