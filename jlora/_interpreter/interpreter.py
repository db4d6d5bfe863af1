"""Evaluates a jaxpr with adapted weights in the place of weights."""

from collections.abc import Callable, Sequence
from typing import Any

from jlora import _compat
from jlora._compat import Eqn, Jaxpr
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules import RULES
from jlora._interpreter.rules.registry import Rule
from jlora._interpreter.sums import PendingSum, waiting_operands
from jlora._ir.algebra import take_picks
from jlora._ir.materialize import without_maps
from jlora._ir.structured import with_matrices
from jlora._ir.weight import AdaptedWeight

# Equations that leave the picks of a weight's factors to those after them: programs inside, and what changes the base
# alone. Not branches: `jax.vmap` gives every operand of a branch that differs from row to row an axis of rows.
_INNER_PROGRAMS = ("scan", "while", "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
_OF_BASE_ALONE = ("copy", "copy_p", "name", "sharding_constraint", "convert_element_type", "stop_gradient", "transpose")
_KEEPS_PICKS = {*_INNER_PROGRAMS, *_OF_BASE_ALONE}
# Equations whose rules know structured networks. All others get these as matrices.
_KEEPS_STRUCTURE = {*_KEEPS_PICKS, "dot_general", "gather", "dynamic_slice"}

# Equations whose rules know maps that sum over indices: they leave them to later equations, apply them to activations,
# or call `without_maps`. Every other rule gets weights without such maps; what has no rule gets the dense weight.
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated", "gather", "dynamic_slice")
_OF_OTHER_AXES = ("reshape", "squeeze", "broadcast_in_dim", "tile", "slice", "split", "mul", "div", "neg")
_OF_TYPE_OR_PLACE = (
    *("layout_constraint", "pvary", "pcast", "reduce_precision", "optimization_barrier", "reshard", "device_put"),
    *("cond", "shard_map", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call"),
)
_KEEPS_MAPS = {*_KEEPS_PICKS, *_PRODUCTS, *_OF_OTHER_AXES, *_OF_TYPE_OR_PLACE}


def run(ctx: Context, jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr. Equations without an adapted operand are bound unchanged.

    Arguments:
        ctx: the state of this run.
        jaxpr: an open jaxpr.
        consts: the values of its constants.
        values: the values of its inputs, arrays or `AdaptedWeight`.

    Returns:
        the values of its outputs: `AdaptedWeight` if the program returns a weight.
    """
    env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

    def read(atom: Any) -> Value:
        if _compat.is_literal(atom):
            return atom.val
        if isinstance(env[atom], PendingSum):
            env[atom] = env[atom].value
        return env[atom]

    prepared: dict[Any, dict[str, Value]] = {}  # weights in the form that a rule takes, for all equations that read it

    def read_as(name: str, atom: Any) -> Value:
        value, form = read(atom), _form_for(name)
        if not isinstance(value, AdaptedWeight) or form is None:
            return value
        forms = prepared.setdefault(atom, {})
        if form.__name__ not in forms:
            forms[form.__name__] = form(value)
        return forms[form.__name__]

    for number, (eqn, unneeded) in enumerate(zip(jaxpr.eqns, _last_uses(jaxpr), strict=True)):
        waiting = waiting_operands(eqn, env, unneeded)
        with _compat.equation_context(eqn):
            operands = [env[atom] if atom in waiting else read_as(eqn.primitive.name, atom) for atom in eqn.invars]
            if any(isinstance(v, (AdaptedWeight, PendingSum)) for v in operands):
                out = _apply(ctx.at(number, eqn), eqn, operands)
            else:
                out = _compat.bind_once(eqn, *operands)
        env.update(zip(eqn.outvars, out, strict=True))
        for var in unneeded:
            del env[var]
            prepared.pop(var, None)
    return [read(atom) for atom in jaxpr.outvars]


def _form_for(name: str) -> Callable[[AdaptedWeight], AdaptedWeight] | None:
    """What turns a weight into a form that the rule of a primitive takes, None if that takes every form."""
    if name in _KEEPS_STRUCTURE:
        return None if name in _KEEPS_PICKS else take_picks
    return _without_structure if name in _KEEPS_MAPS or name not in RULES else _without_structure_and_maps


def _without_structure(f: AdaptedWeight) -> AdaptedWeight:
    return with_matrices(take_picks(f))


def _without_structure_and_maps(f: AdaptedWeight) -> AdaptedWeight:
    return without_maps(_without_structure(f))


def _last_uses(jaxpr: Jaxpr) -> list[set[Any]]:
    """For every equation, the variables that it reads or defines and that nothing after it reads."""
    needed = {atom for atom in jaxpr.outvars if not _compat.is_literal(atom)}
    out = []
    for eqn in reversed(jaxpr.eqns):
        unneeded = {atom for atom in (*eqn.invars, *eqn.outvars) if not _compat.is_literal(atom)} - needed
        needed |= unneeded
        out.append(unneeded)
    return out[::-1]


def _apply(ctx: Context, eqn: Eqn, operands: list[Value]) -> list[Value]:
    """Applies the primitive's rule. If there is no rule, or it returns None, the weights are materialised."""
    if sums := [v for v in operands if isinstance(v, PendingSum)]:
        return [sums[0].after(eqn, [ctx.to_array(eqn, v) for v in operands])]
    rule = RULES.get(eqn.primitive.name)
    out = rule(ctx, eqn, *operands) if rule else None
    if rule is None or out is None:
        return list(_compat.bind(eqn, *(ctx.to_array(eqn, v) for v in operands)))
    _check_outputs(ctx, rule, eqn, out)
    return list(out)


def _check_outputs(ctx: Context, rule: Rule, eqn: Eqn, out: Sequence[Value]) -> None:
    """Raises unless a rule returned one value for each output of the equation, in its shape and dtype."""
    expected = [_compat.aval(var) for var in eqn.outvars]
    if [(v.shape, v.dtype) for v in out] == [(t.shape, t.dtype) for t in expected]:
        return
    is_extension = not rule.__module__.startswith("jlora.")
    returned = ", ".join(f"{v.dtype}{list(v.shape)}" for v in out)
    message = (
        f"The rule for {eqn.primitive.name} in {rule.__module__} returned [{returned}] at {ctx.where}; "
        f"the program has [{', '.join(f'{t.dtype}{list(t.shape)}' for t in expected)}]. "
    )
    if is_extension:
        raise ValueError(message + "Return one value for each output of the equation, in its shape and dtype.")
    raise AssertionError(message + "This is a defect in jlora; please report it.")
