"""Along which axes of the mesh the values of a `shard_map` body differ from device to device.

The types of JAX do not say it: they have no such axes if `check_vma` is off, and a value that meets one which varies is
cast to vary with it, although all devices have the same value.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jlora import _compat
from jlora._compat import Body, Eqn

Axes = frozenset[Any]  # names of mesh axes
OperandAxes = dict[tuple[int, ...], tuple[Axes, ...]]  # of each equation, by its position: one entry for each operand

_NONE: Axes = frozenset()
_ALIKE = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant", "pbroadcast")
_APART = ("axis_index", "reduce_scatter", "all_to_all", "ppermute")


def spec_axes(spec: Any) -> Axes:
    """The mesh axes in a `PartitionSpec`."""
    return frozenset(name for entry in spec if entry for name in (entry if isinstance(entry, tuple) else (entry,)))


def operand_axes(body: Body, inputs: Sequence[Axes], stack: tuple[int, ...]) -> OperandAxes:
    """The mesh axes along which the operands of every equation vary, those of programs inside included.

    Arguments:
        body: the program.
        inputs: the axes along which each of its inputs varies.
        stack: the position of the program, as in `Context.stack`.
    """
    table: OperandAxes = {}
    _body_axes(body, inputs, stack, table)
    return table


def _body_axes(body: Body, inputs: Sequence[Axes], stack: tuple[int, ...], table: OperandAxes) -> list[Axes]:
    """Fills the table for one program, and returns the axes of its outputs."""
    jaxpr, _ = body
    env: dict[Any, Axes] = dict.fromkeys(jaxpr.constvars, _NONE) | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Axes:
        return _NONE if _compat.is_literal(atom) else env[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        at = (*stack, number)
        operands = table[at] = tuple(map(read, eqn.invars))
        rule = _RULES.get(eqn.primitive.name)
        if rule is None and len(bodies := _compat.bodies(eqn)) == 1 and len(bodies[0][0].invars) == len(operands):
            out = _body_axes(bodies[0], operands, (*at, 0), table)
        else:
            out = rule(eqn, operands, at, table) if rule else [_collective(eqn, operands)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _collective(eqn: Eqn, operands: Sequence[Axes]) -> Axes:
    """The axes of a result without a program inside: those of all operands, but for collectives."""
    axes, name = _NONE.union(*operands), eqn.primitive.name
    if name in _APART:
        return axes | _compat.collective_axes(eqn)
    is_complete = name in _ALIKE and eqn.params.get("axis_index_groups") is None
    return axes - _compat.collective_axes(eqn) if is_complete else axes


def _fixed_point(carry: Sequence[Axes], step: Callable[[list[Axes]], Sequence[Axes]]) -> list[Axes]:
    """The axes of a loop's carry after any number of steps."""
    new = [old | more for old, more in zip(carry, step(list(carry)), strict=True)]
    return new if new == list(carry) else _fixed_point(new, step)


def _scan(eqn: Eqn, operands: Sequence[Axes], at: tuple[int, ...], table: OperandAxes) -> list[Axes]:
    p = _compat.scan_params(eqn)
    start, end = p.num_consts, p.num_consts + p.num_carry

    def step(carry: Sequence[Axes]) -> list[Axes]:
        return _body_axes(p.body, [*operands[:start], *carry, *operands[end:]], (*at, 0), table)

    carry = _fixed_point(operands[start:end], lambda carry: step(carry)[: p.num_carry])
    return [*carry, *step(carry)[p.num_carry :]]


def _while(eqn: Eqn, operands: Sequence[Axes], at: tuple[int, ...], table: OperandAxes) -> list[Axes]:
    p = _compat.while_params(eqn)
    start = p.num_condition_consts + p.num_body_consts
    condition_consts, body_consts = operands[: p.num_condition_consts], operands[p.num_condition_consts : start]

    def step(carry: list[Axes]) -> list[Axes]:
        (again,) = _body_axes(p.condition, [*condition_consts, *carry], (*at, 1), table)
        return [axes | again for axes in _body_axes(p.body, [*body_consts, *carry], (*at, 0), table)]

    return _fixed_point(operands[start:], step)


def _cond(eqn: Eqn, operands: Sequence[Axes], at: tuple[int, ...], table: OperandAxes) -> list[Axes]:
    branches = _compat.cond_params(eqn).branches
    outputs = [_body_axes(body, operands[1:], (*at, k), table) for k, body in enumerate(branches)]
    return [operands[0].union(*axes) for axes in zip(*outputs, strict=True)]


def _shard_map(eqn: Eqn, operands: Sequence[Axes], at: tuple[int, ...], table: OperandAxes) -> list[Axes]:
    p = _compat.shard_map_params(eqn)
    inputs = [axes | spec_axes(spec) for axes, spec in zip(operands, p.in_specs, strict=True)]
    return [axes - p.axis_names for axes in _body_axes(p.body, inputs, (*at, 0), table)]


_RULES: dict[str, Callable[[Eqn, Sequence[Axes], tuple[int, ...], OperandAxes], list[Axes]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
