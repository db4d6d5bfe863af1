"""The interpreter: evaluates a jaxpr with factored weights where weights were."""

from collections.abc import Sequence
from typing import Any

from jlora import _compat
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules import RULES
from jlora._interpreter.rules import control_flow as _control
from jlora._ir.weight import AdaptedWeight

_RULES = {**RULES, **_control.RULES}


def run(ctx: Context, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr. Equations without a factored operand are bound unchanged.

    Arguments:
        ctx: what rules may ask for.
        jaxpr: an open jaxpr.
        consts: values of its constants.
        values: values of its arguments, arrays or `Factored`.

    Returns:
        the values of its outputs, `Factored` where a weight is handed through.
    """
    env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

    def read(atom: Any) -> Value:
        return atom.val if _compat.is_literal(atom) else env[atom]

    for eqn, spent in zip(jaxpr.eqns, _spent(jaxpr), strict=True):
        operands = [read(atom) for atom in eqn.invars]
        with _compat.equation_context(eqn):
            if any(isinstance(v, AdaptedWeight) for v in operands):
                out = _apply(ctx, eqn, operands)
            else:
                out = _compat.bind(eqn, *operands)
        env.update(zip(eqn.outvars, out, strict=True))
        for var in spent:
            del env[var]
    return [read(atom) for atom in jaxpr.outvars]


def _spent(jaxpr: Any) -> list[set[Any]]:
    """For every equation the variables that are read by it or made by it, and by nothing after it."""
    seen = {atom for atom in jaxpr.outvars if not _compat.is_literal(atom)}
    out = []
    for eqn in reversed(jaxpr.eqns):
        out.append({atom for atom in (*eqn.invars, *eqn.outvars) if not _compat.is_literal(atom)} - seen)
        seen |= out[-1]
    return out[::-1]


def _apply(ctx: Context, eqn: Any, operands: list[Value]) -> list[Value]:
    rule = _RULES.get(eqn.primitive.name)
    out = rule(ctx, eqn, *operands) if rule else None
    if out is None:
        out = _compat.bind(eqn, *(ctx.materialize(eqn, v) if isinstance(v, AdaptedWeight) else v for v in operands))
    for var, value in zip(eqn.outvars, out, strict=True):
        if value.shape != var.aval.shape or value.dtype != var.aval.dtype:
            raise AssertionError(
                f"jlora's rule for {eqn.primitive.name} at {_compat.source_line(eqn)} gave "
                f"{value.dtype}{list(value.shape)} where the program has {var.aval.str_short()}. "
                "This is a fault in jlora; please report it."
            )
    return out
