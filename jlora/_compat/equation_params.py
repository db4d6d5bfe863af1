"""Parameters of equations with programs inside, one dataclass for each primitive, and of collectives."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jlora._compat.jaxprs import Body, Eqn, open_jaxpr


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
