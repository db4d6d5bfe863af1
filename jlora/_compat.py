"""Differences between JAX releases, and the only place that touches what JAX does not document."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import source_info_util
from jax.core import Tracer
from jax.extend import core

# From JAX 0.12 on a jaxpr carries its own constants and `ClosedJaxpr` is the same class.
_CLOSED = getattr(core, "ClosedJaxpr", core.Jaxpr)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The plain jaxpr and its constants, of an open or a closed one."""
    if isinstance(jaxpr, _CLOSED) and hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a literal and not a variable."""
    return isinstance(atom, core.Literal)


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
    """What is traced inside keeps the equation's source line, name stack and context."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def bind(eqn: Any, *values: Any) -> list[Any]:
    """The equation itself on other values of the same types."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # parameters alone from JAX 0.9.2
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def scan_counts(eqn: Any, values: Sequence[Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from JAX 0.11 on
    return len(consts), len(carry)


def shard_map_axes(eqn: Any) -> frozenset[Any]:
    """The mesh axes over which a `shard_map` is manual."""
    params = eqn.params
    return frozenset(params.get("newly_manual_axes", params.get("manual_axes", ())))


def one_by_one(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, whose `vmap` is a loop where jaxlib needs it.

    On CPUs of few cores two of LAPACK's decompositions of many matrices at a time wait for each other for ever, from
    JAX 0.10 to 0.11.
    """

    @functools.wraps(fun)
    def call(*args: Any) -> Any:
        waits = jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu"
        return (jax.custom_batching.sequential_vmap(fun) if waits else fun)(*args)

    return call


def has_no_mesh(*arrays: Any) -> bool:
    """Whether no mesh is in sight: neither a context mesh nor one in the arrays' types."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in arrays)]
    return all(mesh.empty for mesh in meshes)


def is_single_device(ctx: Any) -> bool:
    """Whether a lowering rule's context is a program for a single device."""
    return getattr(ctx.module_context.axis_context, "num_devices", 0) == 1


def is_tracer(leaf: Any) -> bool:
    """Whether a leaf is being traced."""
    return isinstance(leaf, Tracer)


def source_line(eqn: Any) -> str:
    """The user's source line that made an equation."""
    return source_info_util.summarize(eqn.source_info)
