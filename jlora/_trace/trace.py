"""What a program does with its parameters: `trace`."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora import _compat
from jlora._interpreter import interpreter
from jlora._interpreter.context import Context, Use, Value
from jlora._interpreter.flops import flops
from jlora._interpreter.multiplied import combined_parameters
from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight, as_adapted_weight
from jlora._trace.sites import Roles, Sites
from jlora._trace.stage import Program, stage
from jlora._tree.leaves import is_quantized, sharding
from jlora.methods._base import Adapter
from jlora.methods._lowering import lower_updates
from jlora.methods._sharing import untie


def trace(fun: Callable[..., Any], params: Any, /, *args: Any, roles: Roles | Any = None, **kwargs: Any) -> Sites:
    """Lists every parameter of a program: its shape, the roles of its axes, and the equations that consume it.

    Nothing is computed, so all arrays may be `jax.ShapeDtypeStruct`.

    Arguments:
        fun: `fun(params, *args, **kwargs)`, any function that `jax.jit` could trace.
        params: the base parameters, a pytree of arrays.
        args, kwargs: the other arguments of `fun`.
        roles: roles that the program does not show, as for `Sites.with_roles`: experts that one dense einsum computes
            are a stack, `{".*/experts/up": ("stack", "in", "out")}`. If `fun` has a parameter of this name, it is that.

    Returns:
        the sites, a mapping from path to `Site`. `print` shows them as a table.

    Raises:
        ValueError: if a pattern in `roles` matches no path or is shadowed, or if roles contradict the program.
    """
    if roles is not None and _has_parameter(fun, "roles"):
        kwargs, roles = kwargs | {"roles": roles}, None
    program = stage(fun, params, args, kwargs)
    uses: dict[str, list[Use]] = {path: [] for path in program.paths}
    for use in collect_uses(program, [], trace_only=True):
        uses[use.path].append(use)
    sites = {
        path: Site(path, tuple(leaf.shape), leaf.dtype, _sharding(leaf), tuple(uses[path]))
        for path, leaf in zip(program.paths, program.params, strict=True)
    }
    traced = Sites(sites, flops(program.jaxpr))
    return traced if roles is None else traced.with_roles(roles)


def _has_parameter(fun: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(fun).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


def _sharding(leaf: Any) -> Any:
    return None if _compat.is_tracer(leaf) else sharding(leaf)


def lower_parameters(program: Program, params: Sequence[Any], adapters: Sequence[Adapter]) -> list[Value]:
    """The inputs of an adapted program: parameters that have an update or are quantised as weights, others as arrays.

    A parameter that the program multiplies with an adapted one is a weight too, so that their product is one.

    Arguments:
        program: the base program.
        params: its parameters.
        adapters: the adapters, in order.
    """
    adapters = [untie(adapter) for adapter in adapters]
    adapted = {k for k, path in enumerate(program.paths) if any(path in adapter for adapter in adapters)}
    partners = {k for group in combined_parameters(program.jaxpr, len(params)) if group & adapted for k in group}

    def lower(k: int, leaf: Any, path: str) -> Value:
        if k in adapted or is_quantized(leaf):
            return lower_updates(adapters, leaf, path)
        # Without a path its uses are not reported: it has no update.
        return dataclasses.replace(as_adapted_weight(leaf, path), paths=()) if k in partners else leaf

    return [lower(k, *pair) for k, pair in enumerate(zip(params, program.paths, strict=True))]


def collect_uses(program: Program, adapters: Sequence[Adapter], *, trace_only: bool = False) -> list[Use]:
    """Every use of the weights that have an update or are quantised; with `trace_only`, of all parameters."""
    uses: dict[Any, Use] = {}
    ctx = Context(interpreter.run, lambda f, primitive, where: None, uses=uses, trace_only=trace_only)

    def abstract(params: list[Any], args: list[Any], adapters: list[Adapter]) -> None:
        weights = [as_adapted_weight(*pair) for pair in zip(params, program.paths, strict=True)]
        weights = weights if trace_only else lower_parameters(program, params, adapters)
        out = interpreter.run(ctx, program.jaxpr, program.consts, [*weights, *args])
        for v in out[: program.num_outputs]:
            if isinstance(v, AdaptedWeight):
                ctx.materialize(None, v)

    jax.eval_shape(abstract, program.params, program.args, list(adapters))
    return list(uses.values())
