"""Rules of programs inside programs without a loop: `jit`, calls, `checkpoint`, branches.

Each is rebuilt with the public function that created it, around an interpreted body.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._compat import Body, Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.registry import register_rule
from jlora._ir.algebra import barrier
from jlora._ir.lazy import LazyArray
from jlora._ir.weight import AdaptedWeight


@register_rule("jit", "pjit")
def jit(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Compiles the body under its own name, with the shardings of its inputs and outputs as constraints."""
    p = _compat.jit_params(eqn)
    inner = ctx.child()

    def fun(*values: Value) -> list[Value]:
        inputs = [_constrain(v, s) for v, s in zip(values, p.in_shardings, strict=True)]
        outputs = ctx.run(inner, *p.body, inputs)
        return [_constrain(v, s) for v, s in zip(outputs, p.out_shardings, strict=True)]

    fun.__name__ = fun.__qualname__ = p.name
    return jax.jit(fun, inline=p.inline, keep_unused=p.keep_unused)(*values)


def _constrain(value: Value, sharding: Any) -> Value:
    """The value with a sharding constraint; of a weight, on its base. A lazy base keeps the shardings of its parts."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if not isinstance(value, AdaptedWeight):
        return lax.with_sharding_constraint(value, sharding)
    if isinstance(value.base, LazyArray):
        return value
    return dataclasses.replace(value, base=lax.with_sharding_constraint(value.base, sharding))


@register_rule("closed_call", "core_call", "eval_jaxpr")
def inline(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Evaluates the body of a call in the place of the call."""
    return ctx.run(ctx.child(), *_compat.call_params(eqn).body, values)


@register_rule("custom_jvp_call", "custom_vjp_call", "custom_vmap_call")
def custom(ctx: Context, eqn: Eqn, *values: Value) -> list[Value] | None:
    """Materialises the weights of a function that has its own derivative or batching rule, as those take arrays.

    While tracing, the body is interpreted, because it specifies the roles of the weights' axes.
    """
    return inline(ctx, eqn, *values) if ctx.trace_only else None


@register_rule("checkpoint", "remat", "remat2")
def checkpoint(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Wraps the interpreted body in `jax.checkpoint` with the same policy.

    The second pass of a program that was differentiated before is evaluated as it is.
    """
    p = _compat.checkpoint_params(eqn)
    inner = ctx.child()
    if p.differentiated:
        return ctx.run(inner, *p.body, barrier(values) if p.prevent_cse else values)

    def fun(*values: Value) -> list[Value]:
        return ctx.run(inner, *p.body, values)

    return jax.checkpoint(fun, prevent_cse=p.prevent_cse, policy=p.policy)(*values)


@register_rule("cond")
def cond(ctx: Context, eqn: Eqn, index: Value, *values: Value) -> list[Value]:
    """Interprets every branch. Weights that a branch returns are materialised, as branches must agree in structure."""

    def interpreted(number: int, body: Body) -> Callable[..., list[Value]]:
        inner = ctx.child(branch=number)
        return lambda *values: [inner.to_array(eqn, v) for v in ctx.run(inner, *body, values)]

    branches = [interpreted(k, body) for k, body in enumerate(_compat.cond_params(eqn).branches)]
    return lax.switch(ctx.to_array(eqn, index), branches, *values)
