"""What the rules of matrix products share: maps before and after, a branch for each network.

The product of an activation x with an adapted weight is that with its base, plus one branch for each network:

    y = maps_y(maps_x(x) @ base) + sum over networks of  scale * einsum(x, factors -> y)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.forms import Plan
from jlora._interpreter.rules.product_labels import ProductLabels
from jlora._interpreter.sums import PendingSum, add_up
from jlora._ir import lazy
from jlora._ir.explicit_mesh import under_auto_axes
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.probe import Probe, by_path
from jlora._ir.structured import StructuredNetwork
from jlora._ir.weight import AdaptedWeight, AxisMap, TensorNetwork
from jlora._ops.apart import one_way_barrier, reshape_apart
from jlora._ops.contraction import apply_network, network_flops
from jlora._ops.inputs import record_product
from jlora._ops.maps import apply_maps, form_of, maps_of_sum
from jlora._ops.pair_products import Groups
from jlora._ops.parts import common_part, product_in_parts
from jlora._ops.planner import FACTORED
from jlora._ops.structured_product import apply_structure, merged_product, merged_weight


def multiply(
    ctx: Context,
    eqn: Eqn,
    x: Any,
    f: AdaptedWeight,
    labels: ProductLabels,
    maps: tuple[list[AxisMap], list[AxisMap]],
    *,
    plan: Plan,
    x_is_left: bool = True,
    group_sizes: jax.Array | None = None,
) -> list[Value]:
    """Evaluates a product, and records it.

    Arguments:
        ctx, eqn: the equation of the program.
        x, f: the activation and the weight.
        labels: of the axes.
        maps: those of the activation and those of the result.
        plan: the form of the product; its weight is `f`.
        x_is_left: whether the activation is the left operand.
        group_sizes: of a ragged product.
    """
    ctx.refuse_parts(f, labels.contracted)
    added = plan.added + sum(_added_flops(n, labels) for n in f.networks) + _map_flops(maps, labels)
    name = form_of(*maps) if plan.form == FACTORED else plan.form
    ctx.record(eqn, f, labels.roles, factored=not plan.is_dense, added=added, form=name, why=plan.why)
    form = _Form(
        x=labels.x,
        out=labels.out,
        group=labels.group,
        weight=f.labels,
        index_sizes=tuple(labels.sizes.items()),
        x_is_left=x_is_left,
        precision=eqn.params["precision"],
        is_for_cpu=_compat.is_for_cpu(x),
        is_for_gpu=_compat.is_for_gpu(x),
        has_one_device=_compat.has_one_device(x, *(() if isinstance(f.base, lazy.LazyArray) else (f.base,))),
    )
    networks, all_maps = maps_of_sum(f.networks, *maps) if group_sizes is None else (f.networks, [*maps, []])
    operands = x, f.base, networks, plan.merged, all_maps, group_sizes
    if group_sizes is None and _is_plain(x, f, form):
        return [_traced_once(*operands, form=form, eqn=_compat.Equation.of(eqn))]
    return [_evaluate(*operands, form=form, product=functools.partial(lazy.consume, eqn))]


def _added_flops(n: TensorNetwork, labels: ProductLabels) -> Any:
    """The FLOPs of the product with a network."""
    if isinstance(n, Probe):
        return 0
    sizes = labels.sizes | dict.fromkeys(labels.group, 1)  # a row meets one group
    if not isinstance(n, StructuredNetwork):
        return network_flops(labels.x + labels.group, n, labels.out + labels.group, sizes)
    assert n.structure is not None
    stack = {c for c in labels.x if c not in labels.contracted and any(c in term for term in n.terms)}
    rows = math.prod(sizes[c] for c in labels.x if c not in labels.contracted and c not in stack)
    return n.structure.apply_flops(rows) * math.prod(sizes[c] for c in stack)


def _map_flops(maps: Sequence[list[AxisMap]], labels: ProductLabels) -> Any:
    """The FLOPs of those maps of the activation and of the result that are products."""
    sizes = labels.sizes | dict.fromkeys(labels.group, 1)
    return sum(
        2 * math.prod(size for c, size in _map_sizes(m, sizes).items() if c in m.indices or c in names)
        for names, of_side in zip((labels.x, labels.out), maps, strict=True)
        for m in of_side
        if m.new
    )


def _map_sizes(m: AxisMap, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(m.indices, m.array.shape, strict=True)) | dict(sizes)


@dataclasses.dataclass(frozen=True)
class _Form:
    """What products of equal shapes have in common, whatever their weights are.

    Arguments:
        x, out, group: as in `ProductLabels`.
        weight: the indices of the weight.
        index_sizes: the sizes of all indices, by name.
        x_is_left: whether the activation is the left operand.
        precision: of the program's product.
        is_for_cpu: whether the program is traced for the CPU, which has products of its own.
        is_for_gpu: whether the program is traced for GPUs.
        has_one_device: whether no operand can be sharded.
    """

    x: str
    out: str
    group: str
    weight: str
    index_sizes: tuple[tuple[str, int], ...]
    x_is_left: bool
    precision: Any
    is_for_cpu: bool
    is_for_gpu: bool
    has_one_device: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of all indices."""
        return dict(self.index_sizes)

    @property
    def row(self) -> str:
        """The index of the rows of a ragged product: the only one of the activation that the weight lacks."""
        return next(c for c in self.out if c in self.x and c not in self.weight)

    def groups(self, group_sizes: jax.Array | None) -> Groups | None:
        """The groups of a ragged product, None for other products."""
        return None if group_sizes is None else Groups(self.group, self.row, group_sizes)


def _is_plain(x: Any, f: AdaptedWeight, form: _Form) -> bool:
    """Whether nothing but shapes distinguishes the product: no mesh, no symbolic size, no lazy base."""
    has_numbers = all(isinstance(size, int) for _, size in form.index_sizes)
    return has_numbers and not isinstance(f.base, lazy.LazyArray) and _compat.has_no_mesh(x, f.base)


@functools.partial(jax.jit, static_argnames=("form", "eqn"), inline=True)
def _traced_once(*operands: Any, form: _Form, eqn: Any) -> jax.Array | PendingSum:
    """The product, traced and differentiated once for all layers of the same shapes. The program has no `jit` of it."""
    return _evaluate(*operands, form=form, product=functools.partial(_compat.bind, eqn))


def _evaluate(
    x: jax.Array,
    base: Any,
    networks: Sequence[TensorNetwork],
    merged: Sequence[StructuredNetwork],
    maps: Sequence[list[AxisMap]],
    group_sizes: jax.Array | None,
    *,
    form: _Form,
    product: Callable[..., list[Any]],
) -> jax.Array | PendingSum:
    """The product with the base between maps, plus that with each network, and the maps of the sum."""
    sizes = form.sizes

    def of_weight(x: jax.Array, w: Any) -> jax.Array:
        operands = (x, w) if form.x_is_left else (w, x)
        return product(*operands, *(() if group_sizes is None else (group_sizes,)))[0]

    def branch(
        x: jax.Array, n: TensorNetwork | Sequence[Probe], group_sizes: Any, y: jax.ShapeDtypeStruct
    ) -> jax.Array:
        x = reshape_apart(x, [sizes[c] for c in form.x])
        groups = form.groups(group_sizes)
        if not isinstance(n, TensorNetwork):
            return jnp.broadcast_to(record_product(x, form.x, n, form.out, groups).astype(y.dtype), y.shape)
        if isinstance(n, StructuredNetwork):
            options: Any = {"weight": form.weight, "sizes": sizes, "dtype": y.dtype, "precision": form.precision}
            z = apply_structure(x, form.x, n, form.out, **options)
            return z.reshape(y.shape)
        z = apply_network(
            x,
            form.x,
            n,
            form.out,
            dtype=y.dtype,
            first=form.x_is_left,
            precision=form.precision,
            groups=groups,
        )
        z = _apart(z, form, of_cotangent=True)
        return reshape_apart(jnp.broadcast_to(z, [sizes[c] for c in form.out]), y.shape)

    is_divisible = not (any(maps) or merged) and group_sizes is None and _compat.has_auto_mesh(x, base)
    if part := common_part(networks, form.x, form.weight, form.out) if is_divisible else "":
        like, terms = jax.eval_shape(of_weight, x, base), (form.x, form.weight, form.out)
        x, dense = _as_wide_as(x, base.dtype), lazy.materialize(base)
        y = product_in_parts(x, dense, networks, part, terms, sizes, like.dtype, form.precision)
        return y.reshape(like.shape)
    x_mapped = _map(_as_wide_as(x, base.dtype), form.x, maps[0], group_sizes, form, of_input=True) if maps[0] else x
    if merged:
        shape = jax.eval_shape(of_weight, x, base)
        merge = functools.partial(merged_weight, labels=form.weight, sizes=sizes)
        dtype = base.dtype

        def of_network(x: jax.Array, n: StructuredNetwork) -> jax.Array:
            return branch(_as_wide_as(x, dtype), n, None, shape)

        y = merged_product(x, base, merged, product=of_weight, merge=merge, branch=of_network)
    else:
        y = of_weight(x_mapped, base)
    y = _map(y, form.out, maps[1], group_sizes, form, of_input=False)
    x = _as_wide_as(x, base.dtype)
    x = _apart(x, form) if networks else x
    updates = *(n for n in networks if not isinstance(n, Probe)), *by_path(networks)
    of_update = functools.partial(branch, y=jax.ShapeDtypeStruct(y.shape, y.dtype))
    terms = (under_auto_axes(of_update, y)(x, n, group_sizes) for n in updates)
    total = add_up(y, terms, is_for_cpu=form.is_for_cpu)
    if not maps[2]:
        return total
    total = total.value if isinstance(total, PendingSum) else total
    return _map(total, form.out, maps[2], group_sizes, form, of_input=False)


def _apart(x: jax.Array, form: _Form, *, of_cotangent: bool = False) -> jax.Array:
    """An array that products of the base do not share with those of factors, in programs for GPUs.

    XLA's compiler for GPUs joins two products with a common operand if one of them is small: it would copy the base
    and a factor into one array in every step, which moves three times the bytes of the base's product. So the input of
    a branch, and in the backward pass the cotangent of its result, are other arrays for the compiler. A barrier on the
    other way, too, keeps adds out of the kernels of products. On several devices there are collectives between these,
    and it saves memory.
    """
    if not form.is_for_gpu:
        return x
    return one_way_barrier(x, of_cotangent=of_cotangent) if form.has_one_device else jax.lax.optimization_barrier(x)


def _as_wide_as(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The activation of a branch or of maps: a mixed product is as exact as its wider operand."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype:
        return x
    return x.astype(max(map(accumulation_dtype, (x.dtype, dtype)), key=lambda dtype: dtype.itemsize))


def _map(
    x: jax.Array, term: str, maps: list[AxisMap], group_sizes: jax.Array | None, form: _Form, *, of_input: bool
) -> jax.Array:
    if not maps:
        return x

    def mapped(x: jax.Array, maps: list[AxisMap], group_sizes: jax.Array | None) -> jax.Array:
        groups, precision = form.groups(group_sizes), form.precision
        return apply_maps(x, term, form.sizes, maps, of_input=of_input, precision=precision, groups=groups)

    return under_auto_axes(mapped, x)(x, maps, group_sizes)
