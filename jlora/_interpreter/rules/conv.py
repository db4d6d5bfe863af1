"""Convolutions: `conv_general_dilated` of any rank, stride, dilation, grouping and layout."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.context import Context, Role, Value
from jlora._ir import lazy as _deferred
from jlora._ir.algebra import align_axes, merge_indices, split_index
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.materialize import einsum, fold_full_rank
from jlora._ir.weight import AdaptedWeight, AxisScale, TensorNetwork, fresh_indices
from jlora._ops import contraction as _contract


def conv_general_dilated(ctx: Context, eqn: Any, x: Value, f: Value) -> list[Value] | None:
    """A product onto the rank, a convolution and a product from the rank, as far as the networks have them.

    Forward, a network is a kernel onto the rank and a matrix to the output channels; in the gradient with respect to
    the input, where the kernel stands the other way round, a matrix onto the rank and a kernel from there.
    """
    p = eqn.params
    if isinstance(x, AdaptedWeight) or p["batch_group_count"] != 1:
        return None
    out_axis, in_axis, *spatial_axes = p["dimension_numbers"].rhs_spec
    f, formed = fold_full_rank(merge_indices(ctx.with_dropout_keys(f)))
    split = _split_groups(f, out_axis, p["feature_group_count"])
    if split is None:
        return None
    f, group = split
    spatial, inner = "".join(f.axes[k] for k in spatial_axes), f.axes[in_axis]
    found = [_parts(n, spatial, inner, group, f.axes[out_axis][len(group) :]) for n in f.networks]
    parts = [part for part in found if part]
    if len(parts) < len(found):
        return None
    gains = _gains(f, out_axis, in_axis, p["feature_group_count"])
    if gains is None:
        return None
    (base,) = _deferred.consume(eqn, _along(x, gains[0], p["dimension_numbers"].lhs_spec[1]), f.base)
    base = _along(base, gains[1], p["dimension_numbers"].out_spec[1])
    played: dict[int, Role] = {out_axis: "out", in_axis: "in"}
    roles: dict[str, Role] = {c: played.get(k, "window") for k, axis in enumerate(f.axes) for c in axis}
    rows = base.size // max(f.shape[out_axis], 1)
    added = 2 * rows * sum(p["feature_group_count"] ** (not set(t) & set(group)) * a.size for a, t in _factors(f))
    added = f.base.size if formed else added
    ctx.record(eqn, f, roles, factored=not formed, flops=2 * rows * math.prod(f.shape), added=added)

    def branch(x: jax.Array, n: TensorNetwork, part: _Parts) -> jax.Array:
        return _branch(_contract.apply_dropout(x, fresh_indices([f.used()], x.ndim), n), f, n, part, eqn, base)

    for n, part in zip(f.networks, parts, strict=True):
        base = base + under_auto_axes(functools.partial(branch, part=part), base)(x, n)
    return [base]


def _factors(f: AdaptedWeight) -> list[tuple[jax.Array, str]]:
    return [pair for n in f.networks for pair in zip(n.factors, n.terms, strict=True)]


def _gains(
    f: AdaptedWeight, out_axis: int, in_axis: int, groups: int
) -> tuple[list[jax.Array], list[jax.Array]] | None:
    """The gains as vectors of the input's and of the output's channels; None where one is neither."""
    before, after = [], []
    for g in f.axis_scales:
        if set(g.indices) <= set(f.axes[out_axis]):
            after.append(_vector(g, f, f.axes[out_axis]))
        elif set(g.indices) <= set(f.axes[in_axis]):
            before.append(jnp.tile(_vector(g, f, f.axes[in_axis]), groups))
        else:
            return None
    return before, after


def _vector(g: AxisScale, f: AdaptedWeight, axis: str) -> jax.Array:
    value = align_axes(g.vector, g.indices, axis)
    return jnp.broadcast_to(value, [f.index(c).size for c in axis]).reshape(-1)


def _along(x: jax.Array, vectors: list[jax.Array], axis: int) -> jax.Array:
    for v in vectors:
        v = jnp.expand_dims(v.astype(x.dtype), [k for k in range(x.ndim) if k != axis])
        x = under_auto_axes(jnp.multiply, x)(x, v)
    return x


def _split_groups(f: AdaptedWeight, out_axis: int, groups: int) -> tuple[AdaptedWeight, str] | None:
    """The weight with letters of their own, the first of the output axis, for the groups."""
    group, left = "", groups
    while left > 1:
        name = f.axes[out_axis][len(group)]
        size = f.index(name).size
        if size > left and size % left == 0:
            f, size = split_index(f, name, (left, size // left)), left
        if left % size:
            return None
        group, left = group + name, left // size
    return f, group


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Which factors come before, in and after the convolution, and the letters that lead into and out of its kernel."""

    before: list[int]
    kernel: list[int]
    after: list[int]
    group: str
    inner: str
    outer: str
    into: str
    out_of: str


def _parts(n: TensorNetwork, spatial: str, inner: str, group: str, outer: str) -> _Parts | None:
    """Divides the factors, or gives None where the kernel would be as wide as the weight."""

    def touching(letters: str) -> set[int]:
        return {k for k, t in enumerate(n.terms) if set(t) & set(letters)}

    first, last = touching(inner), touching(outer)
    kernel = (touching(spatial) or first or last) | (first & last)
    kernel |= first if kernel & first else set()
    kernel |= last if kernel & last else set()
    if kernel & first and kernel & last:
        return None
    before, after = first - kernel, last - kernel
    kernel = set(range(len(n.terms))) - before - after

    def shared(side: set[int], others: set[int]) -> str:
        letters = dict.fromkeys("".join(n.terms[k] for k in sorted(side)))
        return "".join(c for c in letters if c not in inner + group + outer and any(c in n.terms[k] for k in others))

    into, out_of = shared(before, kernel | after), shared(after, kernel | before)
    if set(into) & set(out_of):  # a rank that runs through all three: two of them are one kernel onto it
        before, kernel = set(), kernel | before
        out_of = shared(after, kernel)
    return _Parts(
        *(sorted(s) for s in (before, kernel, after)),
        group=group,
        inner=inner,
        outer=outer,
        into=into if before else inner,
        out_of=out_of if after else outer if kernel & last else "",
    )


def _branch(x: jax.Array, f: AdaptedWeight, n: TensorNetwork, part: _Parts, eqn: Any, base: jax.Array) -> jax.Array:
    p, spec = eqn.params, eqn.params["dimension_numbers"]
    groups = p["feature_group_count"]
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else base.dtype
    last = (0, x.ndim - 1, *range(1, x.ndim - 1))  # channels last, so that what surrounds it is a plain product
    x, lhs_spec = x.astype(compute), spec.lhs_spec
    if part.before:
        x = x.transpose([lhs_spec[0], *lhs_spec[2:], lhs_spec[1]])
        matrix = _einsum(n, part.before, f, part.group, part.inner, part.into)
        x = _contract.name_intermediate(_mix(x, matrix.astype(compute), groups, compute, p["precision"]))
        lhs_spec = last
    y = lax.conv_general_dilated(
        x,
        _kernel(f, n, part, spec.rhs_spec, groups).astype(compute),
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        lax.ConvDimensionNumbers(lhs_spec, spec.rhs_spec, last),
        feature_group_count=groups,
        precision=p["precision"],
    )
    if part.after:
        matrix = _einsum(n, part.after, f, part.group, part.out_of, part.outer)
        y = _mix(_contract.name_intermediate(y), matrix.astype(compute), groups, base.dtype, p["precision"])
    elif not part.out_of:  # the same for all outputs of a group
        y = jnp.repeat(y, f.size(part.outer), axis=-1)
    y = y.astype(base.dtype)
    return y.transpose(_inverse((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])))


def _mix(x: jax.Array, matrix: jax.Array, groups: int, dtype: Any, precision: Any) -> jax.Array:
    """A product of the channels, the last axis, with a matrix for each group, `(1 or groups, in, out)`."""
    xs = fresh_indices("gio", x.ndim - 1)
    if groups == 1:
        return _contract.contract_pair(x, xs + "i", matrix[0], "io", xs + "o", dtype=dtype, precision=precision)[0]
    term = "gio" if matrix.shape[0] > 1 else "io"
    matrix = matrix if matrix.shape[0] > 1 else matrix[0]
    x = x.reshape(*x.shape[:-1], groups, -1)
    y, ys = _contract.contract_pair(x, xs + "gi", matrix, term, xs + "go", dtype=dtype, precision=precision)
    y = align_axes(y, ys, xs + "go")
    return y.reshape(*y.shape[:-2], -1)


def _einsum(n: TensorNetwork, which: list[int], f: AdaptedWeight, *axes: str) -> jax.Array:
    """The product of some factors, each axis spelled by letters; of size one where no factor has any of them."""
    terms, factors = [n.terms[k] for k in which], [n.factors[k] for k in which]
    carried = {c: size for a, t in zip(factors, terms, strict=True) for c, size in zip(t, a.shape, strict=True)}
    sizes = {x.name: x.size for x in f.indices} | carried
    axes = tuple(axis if set(axis) & set(carried) else "" for axis in axes)
    order = "".join(axes)
    present = "".join(c for c in order if c in carried)
    value = align_axes(einsum(terms, factors, present, jnp.float32), present, order)
    value = jnp.broadcast_to(value, [sizes[c] for c in order])
    return value.reshape([math.prod(sizes[c] for c in axis) for axis in axes])


def _kernel(f: AdaptedWeight, n: TensorNetwork, part: _Parts, rhs_spec: tuple[int, ...], groups: int) -> jax.Array:
    """The small kernel, laid out like the weight."""
    out_axis, in_axis, *spatial_axes = rhs_spec
    axes = [*(f.axes[k] for k in spatial_axes), part.into, part.group, part.out_of]
    kernel = _einsum(n, part.kernel, f, *axes) * jnp.asarray(n.scale, jnp.float32)
    shape = [*(f.shape[k] for k in spatial_axes), *kernel.shape[-3:]]
    shape[-2] = groups
    if not part.before:
        shape[-3] = f.shape[in_axis]
    kernel = jnp.broadcast_to(kernel, shape).reshape(*shape[:-2], -1)
    return kernel.transpose(_inverse((*spatial_axes, in_axis, out_axis)))


def _inverse(order: tuple[int, ...]) -> list[int]:
    """The permutation that puts axis k at `order[k]`."""
    return [order.index(k) for k in range(len(order))]


RULES = {"conv_general_dilated": conv_general_dilated}
