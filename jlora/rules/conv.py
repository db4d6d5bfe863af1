"""Convolutions: `conv_general_dilated` of any rank, stride, dilation, grouping and layout."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat, _contract
from jlora._context import Context, Role, Value
from jlora._factored import Factored, Network, einsum, fresh, scalar, unify


def conv_general_dilated(ctx: Context, eqn: Any, x: Value, f: Value) -> list[Value] | None:
    """A convolution onto the rank, then a product from the rank to the output channels."""
    p = eqn.params
    if isinstance(x, Factored) or p["batch_group_count"] != 1:
        return None
    f = unify(ctx.drop(f))
    out_axis, *in_axes = p["dimension_numbers"].rhs_spec
    inner = "".join(f.axes[k] for k in in_axes)
    if any(len(axis) > 1 for axis in f.axes) or any(not _splits(n, inner, f.axes[out_axis]) for n in f.networks):
        return None
    (base,) = _compat.bind(eqn, x, f.base)
    roles: dict[str, Role] = {axis: "out" if k == out_axis else "in" for k, axis in enumerate(f.axes)}
    rows = base.size // max(f.shape[out_axis], 1)
    sizes = [
        (p["feature_group_count"] if f.axes[out_axis] not in t else 1) * a.size
        for n in f.networks
        for a, t in zip(n.factors, n.terms, strict=True)
    ]
    ctx.record(eqn, f, roles, flops=2 * rows * math.prod(f.shape), added=2 * rows * sum(sizes))
    for n in f.networks:
        base = base + _branch(x, f, n, eqn, base)
    return [base]


def _splits(n: Network, inner: str, outer: str) -> bool:
    """Whether no factor spans both sides, so that a rank lies between the kernel's input and output."""
    tail = [t for t in n.terms if outer in t]
    return 0 < len(tail) < len(n.terms) and not any(set(t) & set(inner) for t in tail)


def _branch(x: jax.Array, f: Factored, n: Network, eqn: Any, base: jax.Array) -> jax.Array:
    p, spec = eqn.params, eqn.params["dimension_numbers"]
    groups = p["feature_group_count"]
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else base.dtype
    kernel, tail, rank = _kernel_and_tail(f, n, spec.rhs_spec)
    kernel = jnp.tile(kernel, [groups if k == spec.rhs_spec[0] else 1 for k in range(kernel.ndim)])
    last = (0, x.ndim - 1, *range(1, x.ndim - 1))  # channels last, so that what follows is a plain product
    z = lax.conv_general_dilated(
        _contract.drop(x, fresh([f.used()], x.ndim), n),
        kernel.astype(compute),
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        lax.ConvDimensionNumbers(spec.lhs_spec, spec.rhs_spec, last),
        feature_group_count=groups,
        precision=p["precision"],
    )
    options = {"dtype": base.dtype, "precision": p["precision"]}
    tail = tail.astype(compute)
    if groups == 1:
        xs = fresh("ro", x.ndim - 1)
        y, _ = _contract.pair(z, xs + "r", tail, "ro", xs + "o", **options)
    else:
        z = z.reshape(-1, groups, rank)
        y, ys = _contract.pair(z, "bgr", tail.reshape(rank, groups, -1), "rgo", "bgo", **options)
        y = _contract.spread(y, ys, "bgo")
    sizes = [base.shape[k] for k in spec.out_spec]
    y = y.reshape(sizes[0], *sizes[2:], sizes[1])
    return y.transpose(_inverse((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])))


def _kernel_and_tail(f: Factored, n: Network, rhs_spec: tuple[int, ...]) -> tuple[jax.Array, jax.Array, int]:
    """The kernel onto the rank, laid out like the weight, and the `(rank, out)` matrix that follows it."""
    out_axis, *in_axes = rhs_spec
    outer = f.axes[out_axis]
    pairs = list(zip(n.factors, n.terms, strict=True))
    heads, tails = [(a, t) for a, t in pairs if outer not in t], [(a, t) for a, t in pairs if outer in t]
    both = "".join(dict.fromkeys(c for _, t in heads for c in t if any(c in s for _, s in tails)))
    order = "".join(f.axes[k] for k in in_axes) + both
    present = "".join(c for c in order if any(c in t for _, t in heads))
    kernel = einsum([t for _, t in heads], [a for a, _ in heads], present, jnp.float32)
    sizes = {c: a.shape[k] for a, t in heads for k, c in enumerate(t)}
    shape = [f.shape[k] for k in in_axes]
    kernel = jnp.broadcast_to(_contract.spread(kernel, present, order), [*shape, *(sizes[c] for c in both)])
    kernel = kernel.reshape(*shape, -1) * scalar(n.scale, kernel.dtype)
    tail = einsum([t for _, t in tails], [a for a, _ in tails], both + outer, jnp.float32)
    rank = kernel.shape[-1]
    return kernel.transpose(_inverse((*in_axes, out_axis))), tail.reshape(rank, -1), rank


def _inverse(order: tuple[int, ...]) -> list[int]:
    """The permutation that puts axis k at `order[k]`."""
    return [order.index(k) for k in range(len(order))]


RULES = {"conv_general_dilated": conv_general_dilated}
