"""Rules of programs inside programs without a loop: `jit`, calls, `checkpoint`, branches.

Each is rebuilt with the public function that created it, around an interpreted body.
"""

import collections
import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._compat import Body, Eqn, Jaxpr
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.registry import register_rule
from jlora._ir.algebra import barrier
from jlora._ir.lazy import LazyArray, is_deferred
from jlora._ir.weight import AdaptedWeight

_Shardings = tuple[tuple[Any, ...], tuple[Any, ...]]  # of the inputs, and of the outputs

# By the body of a `jit`: what was compiled for it, by the options of the `jit` and of the run.
_COMPILED: "weakref.WeakKeyDictionary[Jaxpr, dict[Any, Callable[..., Any]]]" = weakref.WeakKeyDictionary()


@register_rule("jit", "pjit")
def jit(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """Compiles the body under its own name, with the shardings of its inputs and outputs as constraints.

    JAX traces a function under `jit` once and has one jaxpr for all calls. What is compiled for that jaxpr is kept as
    long as it exists. Constants are arguments of it, so that no array is kept.
    """
    p = _compat.jit_params(eqn)
    shardings, (jaxpr, consts) = (p.in_shardings, p.out_shardings), p.body
    # A deferred equation is a part of the type of its weight, and another one in every trace. The axes along which
    # operands differ from device to device are those of one call.
    is_of_one_call = ctx.device_axes or any(isinstance(v, AdaptedWeight) and is_deferred(v.base) for v in values)
    if is_of_one_call or not ctx.keeps_compiled:
        return _compile(p, functools.partial(_run_body, ctx.child(), shardings, jaxpr))(consts, values)
    by_options = _COMPILED.setdefault(jaxpr, {})
    options = p.name, shardings, p.inline, p.keep_unused, ctx.on_dense, ctx.where
    if options not in by_options:
        by_options[options] = _compile(p, _separate(ctx, shardings, jaxpr))
    paths = {path for v in values if isinstance(v, AdaptedWeight) for path in v.paths}
    counts = tuple((path, n) for path, n in ctx.dropout_uses.items() if path in paths)
    outputs, effects = by_options[options](consts, values, _Effects((), counts))
    ctx.warnings.update(dict.fromkeys(effects.warnings))
    ctx.dropout_uses.update(dict(effects.dropout_uses))
    return outputs


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Effects:
    """What a body changes in its context. As a static result it is kept with what was compiled."""

    warnings: tuple[str, ...]
    dropout_uses: tuple[tuple[str, int], ...]


def _compile(p: _compat.JitParams, fun: Callable[..., Any]) -> Callable[..., Any]:
    def named(*args: Any) -> Any:
        return fun(*args)

    named.__name__ = named.__qualname__ = p.name
    return jax.jit(named, inline=p.inline, keep_unused=p.keep_unused)


def _separate(ctx: Context, shardings: _Shardings, jaxpr: Jaxpr) -> Callable[..., tuple[list[Value], _Effects]]:
    """A body in a context of its own. It must not keep its jaxpr alive, nor the uses of one run."""
    new_context = functools.partial(Context, ctx.run, ctx.on_dense, keeps_compiled=True, caller=ctx.where)
    reference = weakref.ref(jaxpr)

    def fun(consts: Sequence[Any], values: Sequence[Value], before: _Effects) -> tuple[list[Value], _Effects]:
        body = reference()
        assert body is not None, "the equation that is evaluated has it"
        inner = new_context(dropout_uses=collections.Counter(dict(before.dropout_uses)))
        outputs = _run_body(inner, shardings, body, consts, values)
        return outputs, _Effects(tuple(inner.warnings), tuple(inner.dropout_uses.items()))

    return fun


def _run_body(
    ctx: Context, shardings: _Shardings, jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Value]
) -> list[Value]:
    inputs = [_constrain(v, s) for v, s in zip(values, shardings[0], strict=True)]
    outputs = ctx.run(ctx, jaxpr, consts, inputs)
    return [_constrain(v, s) for v, s in zip(outputs, shardings[1], strict=True)]


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
    if not ctx.trace_only:
        return None
    return inline(dataclasses.replace(ctx, dense_in=ctx.dense_in or eqn.primitive.name), eqn, *values)


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
