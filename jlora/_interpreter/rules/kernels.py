"""Custom kernels with a plain twin (`treat_as`): the kernel takes the base, the twin's derivative takes the update."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.weight import AdaptedWeight
from jlora._ops.treat_as import TREAT_AS


@register_rule(TREAT_AS)
def treat_as(ctx: Context, eqn: Eqn, *values: Value) -> list[Value] | None:
    """Adds the plain twin's derivative in the direction of the update to the kernel's value for the base.

    For a twin that is affine in the weight this is what the update adds, and it does not depend on the base.
    """
    weights = {k: v for k, v in enumerate(values) if isinstance(v, AdaptedWeight)}
    if ctx.trace_only:
        return _trace(ctx, eqn, values)
    if any(f.maps or f.gathered_axes for f in weights.values()):
        return None
    updated = {k: f for k, f in weights.items() if f.networks}
    derivative = _derivative(eqn, list(updated))
    if derivative is None:
        return None
    updates = [dataclasses.replace(f, base=lazy.zeros(f.shape, f.dtype)) for f in updated.values()]
    operands = [None if k in updated else v for k, v in enumerate(values)]  # those that the derivative reads
    outputs = lazy.consume(eqn, *(v.base if isinstance(v, AdaptedWeight) else v for v in values))
    axes = ctx.device_axes.get(ctx.stack, (frozenset(),) * len(values))
    inner = ctx.child_on_devices(derivative, [*axes, *(axes[k] for k in updated)], updates)
    added = inner.run(inner, *derivative, [*operands, *updates])
    return [y + ctx.to_array(eqn, dy) for y, dy in zip(outputs, added, strict=True)]


def _trace(ctx: Context, eqn: Eqn, values: Sequence[Value]) -> list[Value]:
    """Records what the plain twin does with the weights; they are dense if it is not affine in one of them."""
    floating = [
        k for k, v in enumerate(values) if isinstance(v, AdaptedWeight) and jnp.issubdtype(v.dtype, jnp.floating)
    ]
    is_affine = all(_derivative(eqn, [k]) is not None for k in floating)
    inner = ctx.child() if is_affine else dataclasses.replace(ctx.child(), dense_in=ctx.dense_in or TREAT_AS)
    return ctx.run(inner, *_compat.open_jaxpr(eqn.params["plain"]), values)


def _derivative(eqn: Eqn, updated: Sequence[int]) -> _compat.Body | None:
    """The plain twin's derivative, as a program of all operands and of the tangents of the updated ones.

    None if it depends on the updated operands themselves: then the twin is not affine in them.
    """
    plain = _compat.open_jaxpr(eqn.params["plain"])
    types = [_compat.aval(atom) for atom in eqn.invars]

    def fun(operands: list[Any], tangents: list[Any]) -> list[Any]:
        def of_updated(*new: Any) -> list[Any]:
            replaced = dict(enumerate(operands)) | dict(zip(updated, new, strict=True))
            return _compat.evaluate(*plain, list(replaced.values()), inline=True)

        return jax.jvp(of_updated, [operands[k] for k in updated], tangents)[1]

    jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(fun)(types, [types[k] for k in updated]))
    eqns, needed = _live(jaxpr)
    if any(jaxpr.invars[k] in needed for k in updated):
        return None
    return jaxpr.replace(eqns=eqns), consts


def _live(jaxpr: Jaxpr) -> tuple[list[Eqn], set[Any]]:
    """The equations that the outputs depend on, and the variables that these equations and the outputs read."""
    needed = {atom for atom in jaxpr.outvars if not _compat.is_literal(atom)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            eqns.append(eqn)
            needed |= {atom for atom in eqn.invars if not _compat.is_literal(atom)}
    return eqns[::-1], needed
