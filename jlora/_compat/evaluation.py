"""Evaluation of equations and of jaxprs."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import source_info_util
from jax._src.interpreters.ad import LinearizeTracer
from jax.extend.core import Primitive

from jlora._compat.equation_params import jit_params
from jlora._compat.jaxprs import Eqn, Jaxpr, bodies, is_literal


def bind(eqn: Eqn, *values: Any, **changes: Any) -> list[Any]:
    """Evaluates an equation on other values of the same types, or of such as fit `changes` of its parameters."""
    bound = eqn.primitive.get_bind_params(eqn.params | changes)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # parameters alone from JAX 0.9.2
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@dataclasses.dataclass(frozen=True)
class Equation:
    """A primitive with its parameters, equal for all equations that have these."""

    primitive: Primitive
    items: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, eqn: Eqn) -> "Equation":
        """What an equation has in common with others."""
        return cls(eqn.primitive, tuple(eqn.params.items()))

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.items)

    @property
    def is_hashable(self) -> bool:
        """Whether the parameters can be compared: an array among them cannot."""
        try:
            hash(self.items)
        except TypeError:
            return False
        return True


def bind_once(eqn: Eqn, *values: Any) -> list[Any]:
    """As `bind`, and if values are differentiated: once for all equations of one primitive, parameters and shapes.

    Functions of `jax.numpy` are differentiated once too, but their equations in a jaxpr have lost that.
    """
    is_differentiated = any(isinstance(value, LinearizeTracer) for value in values)
    if not is_differentiated or eqn.effects or bodies(eqn) or not (key := Equation.of(eqn)).is_hashable:
        return bind(eqn, *values)
    return _differentiated_once(*values, eqn=key)


@functools.partial(jax.jit, static_argnames="eqn", inline=True)
def _differentiated_once(*values: Any, eqn: Any) -> list[Any]:
    return bind(eqn, *values)


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
