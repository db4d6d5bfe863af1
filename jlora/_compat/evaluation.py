"""Evaluation of equations and of jaxprs."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax._src import source_info_util

from jlora._compat.equation_params import jit_params
from jlora._compat.jaxprs import Eqn, Jaxpr, is_literal


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
