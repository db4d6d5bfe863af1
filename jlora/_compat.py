"""Differences between JAX releases, and the only place that reads what JAX does not document.

Jaxprs, the evaluation of an equation, the parameters of equations with programs inside, primitives of jlora's own, and
devices. Each rename in JAX is one edit here.
"""

import contextlib
import dataclasses
import functools
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import source_info_util
from jax.core import Tracer
from jax.core import max_dim as max_dim  # of sizes that may be symbolic
from jax.experimental import topologies
from jax.extend import core
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as Eqn
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

# ---- Jaxprs

# From JAX 0.12 on a jaxpr carries its own constants and `ClosedJaxpr` is the same class.
_CLOSED = getattr(core, "ClosedJaxpr", core.Jaxpr)

Body = tuple[Jaxpr, Sequence[Any]]  # an open jaxpr and the values of its constants


def open_jaxpr(jaxpr: Any) -> Body:
    """The plain jaxpr and its constants, of an open or a closed one."""
    if isinstance(jaxpr, _CLOSED) and hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a literal and not a variable."""
    return isinstance(atom, core.Literal)


def aval(atom: Any) -> Any:
    """The abstract value of an operand or a result of an equation, with its shape, size and dtype."""
    return atom.aval


def is_tracer(leaf: Any) -> bool:
    """Whether a leaf is being traced."""
    return isinstance(leaf, Tracer)


# ---- Evaluation of an equation


def bind(eqn: Eqn, *values: Any, **changes: Any) -> list[Any]:
    """Evaluates an equation on other values of the same types, or of such as fit `changes` of its parameters."""
    bound = eqn.primitive.get_bind_params(eqn.params | changes)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # parameters alone from JAX 0.9.2
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def evaluate(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], *, inline: bool = False) -> list[Any]:
    """Evaluates an open jaxpr.

    Arguments:
        jaxpr: the jaxpr.
        consts: the values of its constants.
        values: the values of its inputs.
        inline: whether programs inside `jit` are evaluated equation by equation too.
    """
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        with equation_context(eqn):
            if inline and eqn.primitive.name in ("jit", "pjit"):
                out = evaluate(*jit_params(eqn).body, operands, inline=True)
            else:
                out = bind(eqn, *operands)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


@contextlib.contextmanager
def equation_context(eqn: Eqn) -> Iterator[None]:
    """Gives what is traced inside the equation's source line, name stack and context."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def source_line(eqn: Eqn, *, of_library: bool = False) -> str:
    """The user's line that an equation comes from, `file:line (function)`; with `of_library` that of a library too."""
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if frame.file_name.startswith(_TRACED_FROM):
            return ""
        if of_library or not frame.file_name.startswith(_LIBRARIES):
            return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return ""


_LIBRARIES = (os.path.dirname(__file__) + os.sep, sysconfig.get_path("purelib") + os.sep)
_TRACED_FROM = _LIBRARIES[0] + "_trace"  # what is called from there is the program


# ---- Parameters of equations with programs inside


@dataclasses.dataclass(frozen=True)
class JitParams:
    """Of `jit`: shardings hold one entry for each input and output, which need not be a `Sharding`."""

    body: Body
    name: str
    in_shardings: tuple[Any, ...]
    out_shardings: tuple[Any, ...]
    inline: bool
    keep_unused: bool


def jit_params(eqn: Eqn) -> JitParams:
    """Reads the parameters of a `jit`."""
    p = eqn.params
    body = open_jaxpr(p["jaxpr"])
    return JitParams(body, p["name"], p["in_shardings"], p["out_shardings"], p["inline"], p["keep_unused"])


@dataclasses.dataclass(frozen=True)
class CallParams:
    """Of a call: closed, core, `custom_jvp`, `custom_vjp` or `custom_vmap`. The body is the primal function."""

    body: Body


def call_params(eqn: Eqn) -> CallParams:
    """Reads the parameters of a call."""
    name = next(name for name in ("call_jaxpr", "call", "jaxpr") if name in eqn.params)
    return CallParams(open_jaxpr(eqn.params[name]))


@dataclasses.dataclass(frozen=True)
class CheckpointParams:
    """Of `jax.checkpoint`: `differentiated` marks the second pass of a program that was differentiated before."""

    body: Body
    prevent_cse: bool | tuple[bool, ...]
    policy: Callable[..., Any] | None
    differentiated: bool


def checkpoint_params(eqn: Eqn) -> CheckpointParams:
    """Reads the parameters of a `jax.checkpoint`."""
    p = eqn.params
    return CheckpointParams(open_jaxpr(p["jaxpr"]), p["prevent_cse"], p["policy"], p["differentiated"])


@dataclasses.dataclass(frozen=True)
class CondParams:
    """Of `lax.cond` and `lax.switch`: the program of every branch."""

    branches: tuple[Body, ...]


def cond_params(eqn: Eqn) -> CondParams:
    """Reads the parameters of a `lax.cond` or `lax.switch`."""
    return CondParams(tuple(map(open_jaxpr, eqn.params["branches"])))


@dataclasses.dataclass(frozen=True)
class ScanParams:
    """Of `lax.scan`: its operands are constants, then carries, then scanned arrays.

    Arguments:
        body: one step.
        num_consts, num_carry: how many operands are constants, and how many are carried.
        length: the number of steps.
        options: the other arguments that `lax.scan` takes.
    """

    body: Body
    num_consts: int
    num_carry: int
    length: int
    options: dict[str, Any]


def scan_params(eqn: Eqn) -> ScanParams:
    """Reads the parameters of a `lax.scan`."""
    p = eqn.params
    if "num_consts" in p:
        num_consts, num_carry = p["num_consts"], p["num_carry"]
    else:  # from JAX 0.11 on
        num_consts, num_carry, _ = map(len, p["ft_in"].unpack())
    options = {"reverse": p["reverse"], "unroll": p["unroll"]}
    if p.get("_split_transpose"):
        options["_split_transpose"] = True
    return ScanParams(open_jaxpr(p["jaxpr"]), num_consts, num_carry, p["length"], options)


@dataclasses.dataclass(frozen=True)
class WhileParams:
    """Of `lax.while_loop`: its operands are the condition's constants, the body's constants, then the carries."""

    condition: Body
    body: Body
    num_condition_consts: int
    num_body_consts: int


def while_params(eqn: Eqn) -> WhileParams:
    """Reads the parameters of a `lax.while_loop`."""
    p = eqn.params
    condition, body = open_jaxpr(p["cond_jaxpr"]), open_jaxpr(p["body_jaxpr"])
    return WhileParams(condition, body, p["cond_nconsts"], p["body_nconsts"])


@dataclasses.dataclass(frozen=True)
class ShardMapParams:
    """Of `jax.shard_map`: specs hold one entry for each input and output; `axis_names` are the manual mesh axes."""

    body: Body
    mesh: Any
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axis_names: frozenset[Any]
    check_vma: bool


def shard_map_params(eqn: Eqn) -> ShardMapParams:
    """Reads the parameters of a `jax.shard_map`."""
    p = eqn.params
    axis_names = frozenset(p.get("newly_manual_axes", p.get("manual_axes", ())))
    body = open_jaxpr(p["jaxpr"])
    return ShardMapParams(body, p["mesh"], tuple(p["in_specs"]), tuple(p["out_specs"]), axis_names, p["check_vma"])


def collective_axes(eqn: Eqn) -> frozenset[Any]:
    """The mesh axes that a collective, or `lax.axis_index`, runs along."""
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
    return frozenset(axes if isinstance(axes, (tuple, list)) else (axes,))


def bodies(eqn: Eqn) -> list[Body]:
    """The programs inside any equation."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [open_jaxpr(v) for v in values if isinstance(v, (core.Jaxpr, _CLOSED))]


# ---- Devices and defects of one release


def is_single_device(ctx: Any) -> bool:
    """Whether a lowering rule's context is a program for a single device."""
    return getattr(ctx.module_context.axis_context, "num_devices", 0) == 1


def topology_devices(name: str, platform: str, **options: Any) -> tuple[Any, ...]:
    """The devices of a topology to compile for, which need not exist."""
    return tuple(topologies.get_topology_desc(name, platform=platform, **options).devices)


def is_for_cpu(*arrays: Any) -> bool:
    """Whether a program is traced for the CPU, as far as is known: it is the default device, and there is no mesh."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = getattr(device, "platform", device) or jax.default_backend()
    return platform == "cpu" and has_no_mesh(*arrays)


def has_no_mesh(*arrays: Any) -> bool:
    """Whether no mesh is in sight: neither a context mesh nor one in the arrays' types."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in arrays)]
    return all(mesh.empty for mesh in meshes)


def row_major_gradient(x: jax.Array) -> jax.Array:
    """A Fourier transform's result with a row-major gradient: on the CPU XLA's transform fails on other layouts."""
    fails = jax.__version_info__ < (0, 13) and jax.default_backend() == "cpu"
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape) if fails else x


def one_by_one(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, whose `vmap` is a loop: on CPUs of few cores two batches of LAPACK calls wait for each other for ever."""

    @functools.wraps(fun)
    def call(*args: Any) -> Any:
        waits = jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu"
        return (jax.custom_batching.sequential_vmap(fun) if waits else fun)(*args)

    return call
