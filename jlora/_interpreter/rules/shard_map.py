"""The rule of `jax.shard_map`: factors are sharded as the weight is."""

import dataclasses
from typing import Any

import jax

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.device_axes import spec_axes
from jlora._interpreter.rules.registry import register_rule
from jlora._ir.materialize import with_dense_base
from jlora._ir.partition import index_axes, num_shards, specs_like
from jlora._ir.weight import AdaptedWeight

Axes = dict[str, Any]  # the mesh axes of every index of a weight


@register_rule("shard_map")
def shard_map(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Shards every factor: each index by the mesh axes of that axis of the weight to which the index belongs.

    A weight whose indices the mesh axes do not divide is materialised, and so is one that the body returns. A lazy base
    is materialised too, because its parts cannot be sharded as the weight is.
    """
    p = _compat.shard_map_params(eqn)
    outer_axes = ctx.device_axes.get(ctx.stack, (frozenset(),) * len(values))
    device_axes = [outer | spec_axes(spec) for outer, spec in zip(outer_axes, p.in_specs, strict=True)]
    inner = ctx.child_on_devices(p.body, device_axes, values)
    axes = [_mesh_axes(v, spec, p.mesh) for v, spec in zip(values, p.in_specs, strict=True)]
    operands: list[Value] = [
        ctx.to_array(eqn, v) if cut is None else with_dense_base(v) for v, cut in zip(values, axes, strict=True)
    ]
    specs = [
        spec if cut is None else specs_like(v, spec, cut)
        for v, spec, cut in zip(operands, p.in_specs, axes, strict=True)
    ]

    def fun(*values: Value) -> list[Value]:
        local = [v if cut is None else _local(v, cut, p.mesh) for v, cut in zip(values, axes, strict=True)]
        return [inner.to_array(eqn, v) for v in ctx.run(inner, *p.body, local)]

    return jax.shard_map(
        fun,
        mesh=p.mesh,
        in_specs=tuple(specs),
        out_specs=list(p.out_specs),
        axis_names=p.axis_names,
        check_vma=p.check_vma,
    )(*operands)


def _mesh_axes(value: Value, spec: Any, mesh: Any) -> Axes | None:
    return index_axes(value, spec, mesh) if isinstance(value, AdaptedWeight) else None


def _local(f: AdaptedWeight, axes: Axes, mesh: Any) -> AdaptedWeight:
    """The weight as one device sees it: every index has the size of one shard."""
    indices = tuple(x._replace(size=x.size // num_shards(axes.get(x.name), mesh)) for x in f.indices)
    return dataclasses.replace(f, indices=indices)
