"""The rule of `jax.shard_map`: factors, and the parts of a quantised base, are sharded as the weight is."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.device_axes import spec_axes
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.explicit_mesh import explicit_axes, under_auto_axes
from jlora._ir.lazy import LazyArray
from jlora._ir.materialize import with_dense_base, without_maps
from jlora._ir.partition import index_axes, specs_like
from jlora._ir.probe import probes, refuse
from jlora._ir.weight import AdaptedWeight
from jlora._tree.pieces import num_shards

Axes = dict[str, Any]  # the mesh axes of every index of a weight


@register_rule("shard_map")
def shard_map(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Shards every factor: each index by the mesh axes of that axis of the weight to which the index belongs.

    A weight whose indices the mesh axes do not divide is materialised, and so is one that the body returns. The parts
    of a quantised base are cut as the weight is, and dequantised in the body; if the program changed its shape before,
    or its format cannot be cut, the base is materialised here.
    """
    p = _compat.shard_map_params(eqn)
    outer_axes = ctx.device_axes.get(ctx.stack, (frozenset(),) * len(values))
    device_axes = [outer | spec_axes(spec) for outer, spec in zip(outer_axes, p.in_specs, strict=True)]
    inner = ctx.child_on_devices(p.body, device_axes, values)
    values = tuple(_with_whole_blocks(v, spec, p.mesh) for v, spec in zip(values, p.in_specs, strict=True))
    axes = [_mesh_axes(v, spec, p.mesh) for v, spec in zip(values, p.in_specs, strict=True)]
    for v, cut in zip(values, axes, strict=True):
        for probe in probes([v]):
            if any((cut or {}).get(name) for name in probe.inputs):
                refuse(probe.path, f"the shard_map at {ctx.where} cuts its in axes, so no device has a whole input")
    operands: list[Value] = [
        ctx.to_array(eqn, v) if cut is None else _with_base_in_pieces(v, spec, p.mesh)
        for v, spec, cut in zip(values, p.in_specs, axes, strict=True)
    ]
    specs = [
        spec if cut is None else _specs(v, spec, cut) for v, spec, cut in zip(operands, p.in_specs, axes, strict=True)
    ]

    def fun(*values: Value) -> list[Value]:
        pieces = zip(values, p.in_specs, axes, strict=True)
        local = [v if cut is None else _local(v, spec, cut, p.mesh) for v, spec, cut in pieces]
        return [inner.to_array(eqn, v) for v in ctx.run(inner, *p.body, local)]

    return jax.shard_map(
        fun,
        mesh=p.mesh,
        in_specs=tuple(specs),
        out_specs=list(p.out_specs),
        axis_names=p.axis_names,
        check_vma=p.check_vma,
    )(*operands)


def _with_whole_blocks(value: Value, spec: Any, mesh: Any) -> Value:
    """The value; a weight whose maps sum over entries of several devices without its maps."""
    if not isinstance(value, AdaptedWeight) or index_axes(value, spec, mesh) is not None:
        return value
    return without_maps(value)


def _mesh_axes(value: Value, spec: Any, mesh: Any) -> Axes | None:
    return index_axes(value, spec, mesh) if isinstance(value, AdaptedWeight) else None


def _entries(spec: Any, ndim: int) -> list[Any]:
    """The entries of a spec, one for each axis."""
    return [*spec, *[None] * (ndim - len(spec))]


def _counts(spec: Any, ndim: int, mesh: Any) -> list[int]:
    """Into how many pieces each axis is cut."""
    return [num_shards(entry, mesh) for entry in _entries(spec, ndim)]


def _with_base_in_pieces(f: AdaptedWeight, spec: Any, mesh: Any) -> AdaptedWeight:
    """The weight with a base that `shard_map` can cut."""
    if not isinstance(f.base, LazyArray):
        return f
    counts, entries = _counts(spec, f.base.ndim, mesh), _entries(spec, f.base.ndim)

    def cut(base: LazyArray) -> LazyArray | None:
        return lazy.cut(base, counts, ", ".join(f.paths))

    if not explicit_axes(f.base):
        base = cut(f.base)
    else:  # there the parts must be placed as `shard_map` cuts them
        replicated = NamedSharding(f.base.sharding.mesh, PartitionSpec())
        base = jax.eval_shape(under_auto_axes(cut, f.base, replicated), f.base)
        if base is not None:
            places = jax.tree.map(lambda s: NamedSharding(replicated.mesh, s), lazy.part_specs(base, entries))
            base = under_auto_axes(cut, f.base, places)(f.base)
    return with_dense_base(f) if base is None else dataclasses.replace(f, base=base)


def _specs(f: AdaptedWeight, spec: Any, axes: Axes) -> AdaptedWeight:
    """The weight with a spec in the place of every array."""
    specs = specs_like(f, spec, axes)
    if not isinstance(f.base, LazyArray):
        return specs
    return dataclasses.replace(specs, base=lazy.part_specs(f.base, _entries(spec, f.base.ndim)))


def _local(f: AdaptedWeight, spec: Any, axes: Axes, mesh: Any) -> AdaptedWeight:
    """The weight as one device sees it: every index has the size of one shard."""
    indices = tuple(x._replace(size=x.size // num_shards(axes.get(x.name), mesh)) for x in f.indices)
    base = f.base
    if isinstance(base, LazyArray):
        base = lazy.piece(base, _counts(spec, base.ndim, mesh))
    return dataclasses.replace(f, base=base, indices=indices)
