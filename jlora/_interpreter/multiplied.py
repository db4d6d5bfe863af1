"""Which parameters a program combines with each other, found without evaluating it."""

from collections.abc import Sequence

from jlora import _compat
from jlora._compat import Eqn, Jaxpr

# The positions of the parameters that a value is computed from, None if it depends on an activation too.
Sources = frozenset[int] | None


def combined_parameters(jaxpr: Jaxpr, num_params: int) -> list[frozenset[int]]:
    """Sets of parameters, by position, of which the program computes a product or a sum: `w @ v`, `w + u`.

    It may list more of them than there are: a parameter in a loop counts as such even if a later step replaces it.
    """
    sets: list[frozenset[int]] = []
    inputs = [frozenset([k]) if k < num_params else None for k in range(len(jaxpr.invars))]
    _propagate(jaxpr, inputs, sets)
    return sets


def _propagate(jaxpr: Jaxpr, inputs: Sequence[Sources], sets: list[frozenset[int]]) -> list[Sources]:
    """The sources of a program's outputs; combined parameters are added to `sets`."""
    nothing: Sources = frozenset()
    env: dict[object, Sources] = dict.fromkeys(jaxpr.constvars, nothing)
    env |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: object) -> Sources:
        return nothing if _compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        env |= zip(eqn.outvars, _outputs(eqn, [read(atom) for atom in eqn.invars], sets), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn: Eqn, operands: Sequence[Sources], sets: list[frozenset[int]]) -> list[Sources]:
    if operands and not any(operands):  # no parameters
        source = None if None in operands else frozenset()
        return [source] * len(eqn.outvars)
    bodies = [body for body, _ in _compat.bodies(eqn) if len(body.invars) <= len(operands)]
    results = [_propagate(body, operands[len(operands) - len(body.invars) :], sets) for body in bodies]
    if results and len(results[-1]) == len(eqn.outvars):
        return results[-1]
    if None in operands:
        return [None] * len(eqn.outvars)
    if eqn.primitive.name in ("dot_general", "add", "sub") and all(operands):
        sets.append(frozenset().union(*filter(None, operands)))
    return [frozenset().union(*filter(None, operands))] * len(eqn.outvars)
