"""Convolutions: `conv_general_dilated` of any rank, stride, dilation, grouping and layout."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Role, Value
from jlora._interpreter.rules.conv_kernel import Kernel, channel_maps, label_kernel
from jlora._interpreter.rules.conv_kronecker import Kronecker, apply_kronecker, divide_kronecker, narrowed
from jlora._interpreter.rules.registry import register_rule
from jlora._interpreter.sums import add_up
from jlora._ir import lazy
from jlora._ir.algebra import align_axes, merge_indices
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.materialize import accumulation_dtype, einsum, fold_full_rank
from jlora._ir.probe import Probe, by_path
from jlora._ir.weight import AdaptedWeight, AxisMap, TensorNetwork, fresh_indices
from jlora._ops.contraction import name_intermediate
from jlora._ops.draws import apply_dropout, refuse_latent
from jlora._ops.inputs import compute_dtype, record_rows
from jlora._ops.maps import apply_maps, form_of
from jlora._ops.pair_products import contract_pair


@register_rule("conv_general_dilated")
def conv_general_dilated(ctx: Context, eqn: Eqn, x: Value, f: Value) -> list[Value] | None:
    """Adds, for each network, a product onto the rank, a convolution and a product from the rank.

    Any of the three may be absent. In the forward pass a network is a kernel onto the rank and a matrix from there to
    the output channels. In the gradient with respect to the input the kernel is turned round: the network is a matrix
    onto the rank and a kernel from there.
    """
    p = eqn.params
    if not isinstance(f, AdaptedWeight) or p["batch_group_count"] != 1:
        return None
    x = ctx.to_array(eqn, x)
    f, folded = fold_full_rank(merge_indices(ctx.with_dropout_keys(f, 0)))
    kernel = label_kernel(f, p["dimension_numbers"].rhs_spec, p["feature_group_count"])
    if kernel is None:
        return None
    f = kernel.f
    ctx.refuse_parts(f, kernel.spatial + kernel.inner)
    networks = [n for n in f.networks if not isinstance(n, Probe)]
    for network in networks:
        refuse_latent(network, "a convolution")
    stages = [s for s in (_divide(n, kernel) for n in networks) if s is not None]
    maps = channel_maps(kernel)
    if len(stages) < len(networks) or maps is None:
        return None
    x_mapped = _map_channels(x, maps[0], kernel, p["dimension_numbers"].lhs_spec[1], of_input=True)
    (y,) = lazy.consume(eqn, x_mapped, f.base)
    y = _map_channels(y, maps[1], kernel, p["dimension_numbers"].out_spec[1], of_input=False)
    _record(ctx, eqn, kernel, y, folded, form_of(*maps))

    def branch(x: jax.Array, n: TensorNetwork, stages: _Stages | Kronecker) -> jax.Array:
        x = apply_dropout(x, fresh_indices([f.used()], x.ndim), n)
        if isinstance(stages, Kronecker):
            return _apply_kronecker(x, n, kernel, stages, eqn, y.dtype)
        return _apply_stages(x, n, kernel, stages, eqn, y.dtype)

    pairs = zip(networks, stages, strict=True)
    terms = (under_auto_axes(functools.partial(branch, stages=stage), y)(x, n) for n, stage in pairs)
    record = functools.partial(_record_windows, kernel=kernel, eqn=eqn)
    records = (under_auto_axes(record, y)(x, group) for group in by_path(f.networks))
    return [add_up(y, itertools.chain(terms, records), is_for_cpu=_compat.is_for_cpu(y))]


def _record(ctx: Context, eqn: Eqn, kernel: Kernel, y: jax.Array, folded: bool, form: str) -> None:
    f, (out_axis, in_axis, *_) = kernel.f, kernel.spec
    roles_of_axes: dict[int, Role] = {out_axis: "out", in_axis: "in"}
    roles: dict[str, Role] = {c: roles_of_axes.get(k, "window") for k, axis in enumerate(f.axes) for c in axis}
    positions = math.prod(n for k, n in enumerate(y.shape) if k != eqn.params["dimension_numbers"].out_spec[1])
    factors = [pair for n in f.networks for pair in zip(n.factors, n.terms, strict=True)]
    factors += [(m.array, m.indices) for m in f.maps if m.new]
    grouped = sum(a.size * (1 if set(term) & set(kernel.group) else kernel.group_count) for a, term in factors)
    added = f.base.size if folded else 2 * positions * grouped
    why = "the update is as large as the weight" if folded else ""
    ctx.record(eqn, f, roles, factored=not folded, added=added, form="dense sum" if folded else form, why=why)


def _map_channels(x: jax.Array, maps: list[AxisMap], kernel: Kernel, axis: int, *, of_input: bool) -> jax.Array:
    """An activation whose channels are those of the input of all groups, or those of the output, after some maps."""
    if not maps:
        return x
    rest = fresh_indices([kernel.f.used()], x.ndim - 1)
    labels = rest[:axis] + kernel.group + (kernel.inner if of_input else kernel.outer) + rest[axis:]
    sizes = kernel.f.sizes | dict(zip(rest, (n for k, n in enumerate(x.shape) if k != axis), strict=True))
    mapped = functools.partial(apply_maps, labels=labels, sizes=sizes, of_input=of_input)
    return under_auto_axes(lambda x, maps: mapped(x, maps=maps), x)(x, maps)


@dataclasses.dataclass(frozen=True)
class _Stages:
    """The factors of a network by stage, and what leads from one stage to the next.

    Arguments:
        before: numbers of the factors that the input channels meet before the convolution.
        kernel: numbers of the factors that make the small kernel.
        after: numbers of the factors that lead to the output channels after the convolution.
        kernel_in, kernel_out: the indices of the small kernel's input and output channels.
    """

    before: list[int]
    kernel: list[int]
    after: list[int]
    kernel_in: str
    kernel_out: str


def _divide(n: TensorNetwork, kernel: Kernel) -> _Stages | Kronecker | None:
    """The stages of a network, or else its division into a convolution and a product of the channels."""
    stages = _divide_factors(n, kernel)
    if stages is not None or kernel.group:
        return stages
    return divide_kronecker(n, kernel.inner, kernel.outer, kernel.spatial, kernel.f.sizes)


def _apply_kronecker(
    x: jax.Array, n: TensorNetwork, kernel: Kernel, part: Kronecker, eqn: Eqn, dtype: jnp.dtype
) -> jax.Array:
    numbers, f = eqn.params["dimension_numbers"], kernel.f
    narrow = narrowed(f, part, kernel.spec[1], kernel.spec[0])
    small = dataclasses.replace(kernel, f=narrow, inner=part.inner, outer=part.outer)

    def convolve(x: jax.Array, n: TensorNetwork) -> jax.Array:
        whole = _Stages([], list(range(len(n.terms))), [], kernel_in=small.inner, kernel_out=small.outer)
        return _apply_stages(x, n, small, _divide_factors(n, small) or whole, eqn, dtype)

    channels, specs = (kernel.inner, kernel.outer), (numbers.lhs_spec[:2], numbers.out_spec[:2])
    options = {"convolve": convolve, "dtype": dtype, "precision": eqn.params["precision"]}
    return apply_kronecker(x, n, part, channels, f, specs, **options)


def _divide_factors(n: TensorNetwork, kernel: Kernel) -> _Stages | None:
    """Divides a network's factors into stages, None if the small kernel would be as wide as the weight."""
    core = _kernel_factors(n, kernel)
    inner, outer = _having(n, kernel.inner), _having(n, kernel.outer)
    if core & inner and core & outer:
        return None
    before, after = inner - core, outer - core
    core = set(range(len(n.terms))) - before - after
    channels = kernel.inner + kernel.group + kernel.outer
    rank_in = _shared_ranks(n, before, core | after, channels)
    rank_out = _shared_ranks(n, after, core | before, channels)
    if set(rank_in) & set(rank_out):  # one rank for all three stages: the first two are one kernel onto it
        before, core = set(), core | before
        rank_out = _shared_ranks(n, after, core, channels)
    return _Stages(
        sorted(before),
        sorted(core),
        sorted(after),
        kernel_in=rank_in if before else kernel.inner,
        kernel_out=rank_out if after else kernel.outer if core & outer else "",
    )


def _record_windows(x: jax.Array, group: list[Probe], kernel: Kernel, eqn: Eqn) -> jax.Array:
    """Records the windows of the input, of which each is a row: zeros, to add to the output."""
    dtype, first, (y,) = compute_dtype(x, group[0]), group[0], map(_compat.aval, eqn.outvars)
    x = lax.stop_gradient(x).astype(dtype)
    parts = []
    for probe in group:
        after = _having(probe, kernel.group + kernel.outer)  # multipliers of output channels are no part of the input
        core = sorted(set(range(len(probe.terms))) - after - {1})
        stages = _Stages([], core, [], kernel_in=kernel.inner, kernel_out=probe.terms[0][-1])
        parts.append(_apply_stages(x, probe, kernel, stages, eqn, dtype))
    h = jnp.moveaxis(functools.reduce(jnp.add, parts), eqn.params["dimension_numbers"].out_spec[1], -1).reshape(
        -1, first.width
    )
    zero = record_rows(h, fresh_indices([kernel.f.used()]), first.factors[1], first.terms[1])
    return jnp.broadcast_to(zero.astype(y.dtype), y.shape)


def _kernel_factors(n: TensorNetwork, kernel: Kernel) -> set[int]:
    """The factors with spatial axes, or with both kinds of channels, and those whose channels such a factor has.

    In a network that is constant along the window, the factors with input channels take their place, or else those with
    output channels.
    """
    inner, outer = _having(n, kernel.inner), _having(n, kernel.outer)
    core = (_having(n, kernel.spatial) or inner or outer) | (inner & outer)
    core |= inner if core & inner else set()
    return core | (outer if core & outer else set())


def _having(n: TensorNetwork, names: str) -> set[int]:
    """The numbers of the factors that have any of the indices."""
    return {k for k, term in enumerate(n.terms) if set(term) & set(names)}


def _shared_ranks(n: TensorNetwork, one: set[int], other: set[int], channels: str) -> str:
    """The indices, channels excepted, that factors of both sets have."""
    names = dict.fromkeys("".join(n.terms[k] for k in sorted(one)))
    return "".join(c for c in names if c not in channels and any(c in n.terms[k] for k in other))


def _apply_stages(
    x: jax.Array, n: TensorNetwork, kernel: Kernel, stages: _Stages, eqn: Eqn, dtype: jnp.dtype
) -> jax.Array:
    """One network's branch: the product onto the rank, the convolution and the product from the rank."""
    p, spec, groups = eqn.params, eqn.params["dimension_numbers"], kernel.group_count
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else dtype
    channels_last = (0, x.ndim - 1, *range(1, x.ndim - 1))  # so that the stages around it are plain products
    x, lhs_spec = x.astype(compute), spec.lhs_spec
    if stages.before:
        x = x.transpose([lhs_spec[0], *lhs_spec[2:], lhs_spec[1]])
        matrix = _contract_factors(n, stages.before, kernel.f, kernel.group, kernel.inner, stages.kernel_in)
        x = name_intermediate(_mix_channels(x, matrix.astype(compute), groups, compute, p["precision"]))
        lhs_spec = channels_last
    small = _small_kernel(n, kernel, stages).astype(compute)
    small = small + lax.full_like(x, 0, shape=())  # in a `shard_map` both operands must vary along the same mesh axes
    numbers = lax.ConvDimensionNumbers(lhs_spec, spec.rhs_spec, channels_last)
    # Not by `lax.conv_general_dilated`, which refuses the padding that it computes itself from symbolic sizes.
    (y,) = _compat.bind(eqn, x, small, dimension_numbers=numbers, preferred_element_type=None, out_sharding=None)
    if stages.after:
        matrix = _contract_factors(n, stages.after, kernel.f, kernel.group, stages.kernel_out, kernel.outer)
        y = _mix_channels(name_intermediate(y), matrix.astype(compute), groups, dtype, p["precision"])
    elif not stages.kernel_out:  # the network is constant along the outputs of a group
        y = jnp.repeat(y, kernel.f.size(kernel.outer), axis=-1)
    return y.astype(dtype).transpose(_inverse((spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])))


def _mix_channels(x: jax.Array, matrix: jax.Array, groups: int, dtype: Any, precision: Any) -> jax.Array:
    """A product of the channels, the last axis, with a matrix for each group, `(1 or groups, in, out)`."""
    xs = fresh_indices("gio", x.ndim - 1)
    if groups == 1:
        return contract_pair(x, xs + "i", matrix[0], "io", xs + "o", dtype=dtype, precision=precision)[0]
    term = "gio" if matrix.shape[0] > 1 else "io"
    matrix = matrix if matrix.shape[0] > 1 else matrix[0]
    x = x.reshape(*x.shape[:-1], groups, -1)
    y, ys = contract_pair(x, xs + "gi", matrix, term, xs + "go", dtype=dtype, precision=precision)
    y = align_axes(y, ys, xs + "go")
    return y.reshape(*y.shape[:-2], -1)


def _contract_factors(n: TensorNetwork, numbers: list[int], f: AdaptedWeight, *axes: str) -> jax.Array:
    """The product of some factors, each axis labelled by indices; of size one if no factor has any of them."""
    terms, factors = [n.terms[k] for k in numbers], [n.factors[k] for k in numbers]
    carried = {c: size for a, t in zip(factors, terms, strict=True) for c, size in zip(t, a.shape, strict=True)}
    sizes = f.sizes | carried
    axes = tuple(axis if set(axis) & set(carried) else "" for axis in axes)
    labels = "".join(axes)
    present = "".join(c for c in labels if c in carried)
    value = align_axes(einsum(terms, factors, present, accumulation_dtype(f.dtype)), present, labels)
    value = jnp.broadcast_to(value, [sizes[c] for c in labels])
    return value.reshape([math.prod(sizes[c] for c in axis) for axis in axes])


def _small_kernel(n: TensorNetwork, kernel: Kernel, stages: _Stages) -> jax.Array:
    """The kernel of the convolution stage, in the weight's layout."""
    f, (out_axis, in_axis, *spatial_axes) = kernel.f, kernel.spec
    axes = [*(f.axes[k] for k in spatial_axes), stages.kernel_in, kernel.group, stages.kernel_out]
    value = _contract_factors(n, stages.kernel, f, *axes)
    value = value * jnp.asarray(n.scale, value.dtype)
    shape = [*(f.shape[k] for k in spatial_axes), *value.shape[-3:]]
    shape[-2] = kernel.group_count
    if not stages.before:
        shape[-3] = f.shape[in_axis]
    value = jnp.broadcast_to(value, shape).reshape(*shape[:-2], -1)
    return value.transpose(_inverse((*spatial_axes, in_axis, out_axis)))


def _inverse(order: tuple[int, ...]) -> list[int]:
    """The permutation that puts axis k at `order[k]`."""
    return [order.index(k) for k in range(len(order))]
