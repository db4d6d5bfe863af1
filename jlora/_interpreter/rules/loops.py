"""Rules of loops: `lax.scan` and `lax.while_loop`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value, fold_dropout_keys, has_dropout
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.algebra import pick_along, relabel, take_picks
from jlora._ir.materialize import with_dense_base, without_maps_along
from jlora._ir.structured import with_matrices
from jlora._ir.weight import AdaptedWeight, Index, fresh_indices

Slices = tuple[Any, list[jax.Array | None]]  # of a weight's base, and of its other arrays


@register_rule("scan")
def scan(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """A loop whose constants, carries and scanned operands may be weights.

    A scanned weight gives each step the slices of those factors that have the scanned index; its other factors are
    constants of the loop. A carried weight stays factored if every step returns it in the same form; if every step
    returns it unchanged, it is a constant of the loop.
    """
    p = _compat.scan_params(eqn)
    consts, init = values[: p.num_consts], values[p.num_consts : p.num_consts + p.num_carry]
    xs = [_scanned(ctx, eqn, x, p.length) for x in values[p.num_consts + p.num_carry :]]
    inner = ctx.child(trip_count=p.length)

    unchanged = _unchanged_weights(p, init)
    changing = [k for k in range(p.num_carry) if k not in unchanged]
    fixed = [*consts, *(init[k] for k in unchanged)]
    numbers = jnp.arange(p.length) if any(map(has_dropout, values[: p.num_consts + p.num_carry])) else None
    sliced = numbers, [x.slices if isinstance(x, ScannedWeight) else x for x in xs]

    def step(carry: list[Value], inputs: tuple[Any, list[Any]]) -> tuple[list[Value], list[Value]]:
        number, slices = inputs
        constants = _with_step_keys(fixed, number)
        carried = _by_position(changing, carry) | _by_position(unchanged, constants[p.num_consts :])
        items = [x.rebuild(s) if isinstance(x, ScannedWeight) else s for x, s in zip(xs, slices, strict=True)]
        operands = [*constants[: p.num_consts], *(carried[k] for k in range(p.num_carry)), *items]
        outputs = ctx.run(inner, *p.body, operands)
        return [outputs[k] for k in changing], outputs[p.num_carry :]

    def step_in_form(carry: list[Value], inputs: tuple[Any, list[Any]]) -> tuple[list[Value], list[Value]]:
        new, ys = step(carry, inputs)
        return _in_form_of(carry, new, inner, eqn), _map_weights(lambda y: with_dense_base(take_picks(y)), ys)

    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), sliced)
    start = carry_fixed_point(ctx, eqn, [init[k] for k in changing], lambda carry: step(carry, first)[0])
    length = None if jax.tree.leaves(sliced) else p.length  # `lax.scan` takes a symbolic length from arrays alone
    carry, ys = lax.scan(step_in_form, start, sliced, length=length, **p.options)
    last = _by_position(changing, carry) | {k: init[k] for k in unchanged}
    return [*(last[k] for k in range(p.num_carry)), *_map_weights(lambda y: _stacked(y, p.length), ys)]


def _unchanged_weights(p: _compat.ScanParams, init: Sequence[Value]) -> list[int]:
    """The positions of the carried weights that every step returns as they are."""
    jaxpr, _ = p.body
    carries = jaxpr.invars[p.num_consts : p.num_consts + p.num_carry]
    pairs = zip(carries, jaxpr.outvars[: p.num_carry], strict=True)
    return [k for k, (old, new) in enumerate(pairs) if old is new and isinstance(init[k], AdaptedWeight)]


@register_rule("while")
def while_(ctx: Context, eqn: Eqn, *values: Value) -> list[Value]:
    """A loop whose constants and carries may be weights; a carried one stays factored if every step keeps its form.

    With dropout, the loop also counts its steps, so that every step has its own mask.
    """
    p = _compat.while_params(eqn)
    num_consts = p.num_condition_consts + p.num_body_consts
    condition_consts, body_consts = values[: p.num_condition_consts], values[p.num_condition_consts : num_consts]
    inner, outer = ctx.child(), ctx.child(branch=1)

    def goes_on(carry: Sequence[Value]) -> jax.Array:
        return ctx.run(outer, *p.condition, [*condition_consts, *carry])[0]

    def body(carry: list[Value], number: Any = None) -> list[Value]:
        new = ctx.run(inner, *p.body, [*_with_step_keys(body_consts, number), *carry])
        return _select_rows(goes_on(carry), new, carry, inner, eqn)

    def step(state: tuple[Any, list[Value]]) -> tuple[Any, list[Value]]:
        number, carry = state
        new = _in_form_of(carry, body(carry, number), inner, eqn)
        return None if number is None else number + 1, new

    def condition(state: tuple[Any, list[Value]]) -> jax.Array:
        return jnp.any(goes_on(state[1]))  # in a batch, of each row

    number = jnp.int32(0) if any(map(has_dropout, values)) else None
    return lax.while_loop(condition, step, (number, carry_fixed_point(ctx, eqn, values[num_consts:], body)))[1]


def _select_rows(goes_on: jax.Array, new: Sequence[Value], old: Sequence[Value], ctx: Context, eqn: Eqn) -> list[Value]:
    """The new carry. Rows of a batch that are finished keep their old values; a weight that changes is materialised.

    If the length of a loop differs from row to row, `jax.vmap` gives its condition and all carries leading axes.
    """
    if not goes_on.ndim:
        return list(new)

    def select(value: Value, before: Value) -> Value:
        if value is before:
            return before
        value, before = ctx.to_array(eqn, value), ctx.to_array(eqn, before)
        return lax.select(lax.broadcast_in_dim(goes_on, value.shape, range(goes_on.ndim)), value, before)

    return [select(value, before) for value, before in zip(new, old, strict=True)]


def carry_fixed_point(
    ctx: Context, eqn: Eqn, carry: Sequence[Value], step: Callable[[list[Value]], list[Value]]
) -> list[Value]:
    """A carry that one step returns in the same form: weights that change are materialised.

    Of a quantised weight first the base alone is materialised.
    """
    carry = _map_weights(take_picks, carry)  # `jax.vmap` may give every carry an axis of rows, a whole bank too
    while any(isinstance(v, AdaptedWeight) for v in carry):
        out = jax.eval_shape(step, carry)
        changed = [isinstance(a, AdaptedWeight) and _form(a) != _form(b) for a, b in zip(carry, out, strict=True)]
        if not any(changed):
            break
        ctx.forget_inner_uses()
        carry = [_materialize_carry(ctx, eqn, v) if c else v for v, c in zip(carry, changed, strict=True)]
    return carry


def _materialize_carry(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> Value:
    return with_dense_base(f) if isinstance(f.base, lazy.LazyArray) else ctx.materialize(eqn, f)


def _form(value: Value) -> Any:
    """The structure of a value, with shapes and dtypes in the place of arrays."""
    return jax.tree.map(lambda a: (jnp.shape(a), a.dtype if hasattr(a, "dtype") else jax.dtypes.result_type(a)), value)


def _in_form_of(carry: list[Value], new: list[Value], ctx: Context, eqn: Eqn) -> list[Value]:
    """The new carry, in which a weight is materialised if the old carry has an array."""
    return [v if isinstance(old, AdaptedWeight) else ctx.to_array(eqn, v) for old, v in zip(carry, new, strict=True)]


def _by_position(positions: Sequence[int], values: Sequence[Value]) -> dict[int, Value]:
    return dict(zip(positions, values, strict=True))


def _with_step_keys(values: Sequence[Value], number: jax.Array | None) -> list[Value]:
    """The loop's constants for one step: with dropout, `number` is folded into their keys."""
    return list(values) if number is None else _map_weights(lambda f: fold_dropout_keys(f, number), values)


def _map_weights(fn: Callable[[AdaptedWeight], Value], values: Sequence[Value]) -> list[Value]:
    return [fn(v) if isinstance(v, AdaptedWeight) else v for v in values]


def _scanned(ctx: Context, eqn: Eqn, x: Value, length: int) -> "ScannedWeight | jax.Array":
    """A scanned operand. A weight whose first axis has several indices cannot be scanned: it is materialised."""
    if not isinstance(x, AdaptedWeight):
        return x
    x = without_maps_along(x, [0])
    return ScannedWeight.of(x, length) if len(x.axes[0]) == 1 else ctx.materialize(eqn, x)


@dataclasses.dataclass(frozen=True)
class ScannedWeight:
    """A weight that a loop scans along its first axis.

    Arguments:
        weight: the weight.
        name: the index of its first axis.
        slices: the arrays that have this index, with its axis first; None for those that do not have it.
    """

    weight: AdaptedWeight
    name: str
    slices: Slices

    @staticmethod
    def of(f: AdaptedWeight, length: int) -> "ScannedWeight":
        """Moves the scanned index of every array to the front. A lazy base that has no slices is materialised.

        Factors with picks stay as they are, and each step picks its own entries.
        """
        f = pick_along(with_matrices(f, lambda n: f.axes[0] not in n.inputs + n.outputs), f.axes[0])
        name, base = f.axes[0], lazy.with_leading_axis(f.base, length)
        base = lazy.materialize(f.base) if base is None else base
        arrays = [jnp.moveaxis(a, term.index(name), 0) if name in term else None for a, term in f.arrays]
        return ScannedWeight(f, name, (base, arrays))

    def rebuild(self, slices: Slices) -> AdaptedWeight:
        """The weight of one step, from that step's slices."""
        base, arrays = slices
        sliced = iter(arrays)

        def at_step(array: jax.Array, term: str) -> tuple[jax.Array, str]:
            part = next(sliced)
            return (array, term) if part is None else (part, term.replace(self.name, ""))

        return relabel(self.weight.map_arrays(at_step), lazy.slice_leading(base), self.weight.axes[1:])


def _stacked(f: AdaptedWeight, length: int) -> AdaptedWeight:
    """The weights that the steps of a loop return, as one: every array in `f` has a new first axis."""
    name = fresh_indices([f.used()])
    stacked = f.map_arrays(lambda array, term: (array, name + term))
    return relabel(stacked, f.base, [name, *f.axes], [Index(name, length)])
