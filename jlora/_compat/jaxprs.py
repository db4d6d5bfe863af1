"""Jaxprs, their atoms, and the programs inside an equation."""

from collections.abc import Sequence
from typing import Any

from jax.core import Tracer
from jax.core import max_dim as max_dim  # of sizes that may be symbolic
from jax.extend import core
from jax.extend.core import Jaxpr as Jaxpr
from jax.extend.core import JaxprEqn as Eqn

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


def bodies(eqn: Eqn) -> list[Body]:
    """The programs inside any equation."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [open_jaxpr(v) for v in values if isinstance(v, (core.Jaxpr, _CLOSED))]
