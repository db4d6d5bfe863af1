"""Programs inside programs (`jit`, `checkpoint`, loops, branches, `shard_map`), rebuilt with public functions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._interpreter.context import Context, Value, fold_dropout_keys
from jlora._ir import lazy as _deferred
from jlora._ir.algebra import barrier, relabel
from jlora._ir.partition import index_axes, num_shards, specs_like
from jlora._ir.weight import AdaptedWeight, Index, fresh_indices


def _is_weight(value: Any) -> bool:
    return isinstance(value, AdaptedWeight)


def _made(f: AdaptedWeight) -> AdaptedWeight:
    """The weight with its base at hand, where a quantised one cannot be handed on in parts."""
    return dataclasses.replace(f, base=_deferred.materialize(f.base))


def _form(ctx: Context, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Forms every weight among the values, and says so."""
    return [ctx.materialize(eqn, v) if _is_weight(v) else v for v in values]


def jit(ctx: Context, eqn: Any, *values: Value) -> list[Value]:
    p = eqn.params
    inner = ctx.child(eqn)

    def fun(*values: Value) -> list[Value]:
        constrained = [_constrain(v, s) for v, s in zip(values, p["in_shardings"], strict=True)]
        out = ctx.run(inner, *_compat.open_jaxpr(p["jaxpr"]), constrained)
        return [_constrain(v, s) for v, s in zip(out, p["out_shardings"], strict=True)]

    fun.__name__ = fun.__qualname__ = p["name"]
    return jax.jit(fun, inline=p["inline"], keep_unused=p["keep_unused"])(*values)


def _constrain(value: Value, sharding: Any) -> Value:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if _is_weight(value):
        if isinstance(value.base, _deferred.LazyArray):  # its parts lie where they lie
            return value
        return dataclasses.replace(value, base=lax.with_sharding_constraint(value.base, sharding))
    return lax.with_sharding_constraint(value, sharding)


def inline(ctx: Context, eqn: Any, *values: Value) -> list[Value]:
    return ctx.run(ctx.child(eqn), *_compat.open_jaxpr(eqn.params["call_jaxpr"]), values)


def custom(ctx: Context, eqn: Any, *values: Value) -> list[Value] | None:
    """A function with a derivative or a batching rule of the user's own, which takes weights as they are.

    So they are formed, but what the function does with them is looked at: it says what their axes are.
    """
    if not ctx.trace_only:
        return None
    body = eqn.params["call"] if eqn.primitive.name == "custom_vmap_call" else eqn.params["call_jaxpr"]
    return ctx.run(ctx.child(eqn), *_compat.open_jaxpr(body), values)


def checkpoint(ctx: Context, eqn: Any, *values: Value) -> list[Value]:
    p = eqn.params
    inner = ctx.child(eqn)
    jaxpr, consts = _compat.open_jaxpr(p["jaxpr"])
    if p["differentiated"]:  # the second pass of a program that was differentiated before: it runs as it stands
        return ctx.run(inner, jaxpr, consts, barrier(values) if p["prevent_cse"] else values)

    def fun(*values: Value) -> list[Value]:
        return ctx.run(inner, jaxpr, consts, values)

    return jax.checkpoint(fun, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


def cond(ctx: Context, eqn: Any, index: Value, *values: Value) -> list[Value]:
    def branch(k: int, jaxpr: Any) -> Callable[..., list[Value]]:
        inner = ctx.child(eqn, branch=k)
        return lambda *values: _form(inner, eqn, ctx.run(inner, *_compat.open_jaxpr(jaxpr), values))

    if _is_weight(index):
        (index,) = _form(ctx, eqn, [index])
    return lax.switch(index, [branch(k, j) for k, j in enumerate(eqn.params["branches"])], *values)


def scan(ctx: Context, eqn: Any, *values: Value) -> list[Value]:
    """A loop whose constants, carries and scanned operands may be weights.

    A scanned weight gives each step its own slice of the factors that have the scanned letter; the others are
    constants. A carried weight stays factored as long as every step hands on the same form.
    """
    p = eqn.params
    jaxpr, outer = _compat.open_jaxpr(p["jaxpr"])
    n_consts, n_carry = _compat.scan_counts(eqn, values)
    consts, init, xs = values[:n_consts], list(values[n_consts : n_consts + n_carry]), values[n_consts + n_carry :]
    length = p["length"]
    inner = ctx.child(eqn, trip_count=length)

    xs = [_Scanned.of(x, length) if _is_weight(x) else x for x in xs]
    formed = _form(ctx, eqn, [x for x in xs if _is_weight(x)])
    xs = [formed.pop(0) if _is_weight(x) else x for x in xs]
    random = any(n.key is not None for v in (*consts, *init) if _is_weight(v) for n in v.networks)
    sliced = (jnp.arange(length) if random else None, [x.scanned if isinstance(x, _Scanned) else x for x in xs])

    kept: dict[int, Value] = {}  # carries that every step hands on untouched are constants
    for k in range(n_carry):
        if _is_weight(init[k]) and jaxpr.outvars[k] is jaxpr.invars[n_consts + k]:
            kept[k] = init[k]
    free = [k for k in range(n_carry) if k not in kept]

    def body(carry: list[Value], step: Any) -> tuple[list[Value], list[Value]]:
        number, slices = step
        fixed = [*consts, *kept.values()]
        if number is not None:
            fixed = [fold_dropout_keys(v, number) if _is_weight(v) else v for v in fixed]
        whole = dict(zip(free, carry, strict=True)) | dict(zip(kept, fixed[n_consts:], strict=True))
        items = [x.rebuild(s) if isinstance(x, _Scanned) else s for x, s in zip(xs, slices, strict=True)]
        out = ctx.run(inner, jaxpr, outer, [*fixed[:n_consts], *(whole[k] for k in range(n_carry)), *items])
        return [out[k] for k in free], out[n_carry:]

    def formed_body(carry: list[Value], step: Any) -> tuple[list[Value], list[Value]]:
        out, ys = body(carry, step)
        out = [v if _is_weight(c) else _form(inner, eqn, [v])[0] for c, v in zip(carry, out, strict=True)]
        return out, [_made(y) if _is_weight(y) else y for y in ys]

    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), sliced)
    carry = _steady(ctx, eqn, [init[k] for k in free], lambda c, step: body(c, step)[0], first)
    carry, ys = lax.scan(
        formed_body,
        carry,
        sliced,
        length=length,
        reverse=p["reverse"],
        unroll=p["unroll"],
        **({"_split_transpose": True} if p.get("_split_transpose") else {}),
    )
    done = dict(zip(free, carry, strict=True)) | kept
    return [*(done[k] for k in range(n_carry)), *(_stacked(y, length) if _is_weight(y) else y for y in ys)]


def _steady(ctx: Context, eqn: Any, carry: list[Value], body: Callable[..., list[Value]], *step: Any) -> list[Value]:
    """Forms those carried weights that a step does not hand on in the same form; of a quantised one first the base."""
    while any(map(_is_weight, carry)):
        out = jax.eval_shape(body, carry, *step)
        changed = [
            _is_weight(a) and jax.tree.map(_type, a) != jax.tree.map(_type, b) for a, b in zip(carry, out, strict=True)
        ]
        if not any(changed):
            break
        carry = [_settled(ctx, eqn, v) if c else v for v, c in zip(carry, changed, strict=True)]
    return carry


def _settled(ctx: Context, eqn: Any, f: AdaptedWeight) -> Value:
    return _made(f) if isinstance(f.base, _deferred.LazyArray) else _form(ctx, eqn, [f])[0]


def _type(a: Any) -> tuple[Any, Any]:
    return jnp.shape(a), jax.dtypes.result_type(a) if not hasattr(a, "dtype") else a.dtype


@dataclasses.dataclass(frozen=True)
class _Scanned:
    """A weight whose first axis a loop runs over."""

    weight: AdaptedWeight
    name: str
    scanned: tuple[jax.Array, list[jax.Array | None]]  # of the base, and of every other array of the weight

    @staticmethod
    def of(f: AdaptedWeight, length: int) -> "AdaptedWeight | _Scanned":
        """Moves the scanned letter of every factor to the front.

        A first axis of several letters cannot be scanned. A quantised base that cannot be cut along it is made.
        """
        if len(f.axes[0]) > 1:
            return f
        name, base = f.axes[0], _deferred.with_leading_axis(f.base, length)
        base = _deferred.materialize(f.base) if base is None else base

        arrays = [jnp.moveaxis(a, term.index(name), 0) if name in term else None for a, term in f.arrays]
        return _Scanned(f, name, (base, arrays))

    def rebuild(self, slices: tuple[jax.Array, list[jax.Array | None]]) -> AdaptedWeight:
        base, arrays = slices
        sliced = iter(arrays)

        def at_step(array: jax.Array, term: str) -> tuple[jax.Array, str]:
            part = next(sliced)
            return (array, term) if part is None else (part, term.replace(self.name, ""))

        return relabel(self.weight.map_arrays(at_step), _deferred.slice_leading(base), self.weight.axes[1:])


def _stacked(f: AdaptedWeight, length: int) -> AdaptedWeight:
    """Weights that a loop hands out one a step: every array in `f` has a new first axis."""
    name = fresh_indices([f.used()])

    stacked = f.map_arrays(lambda array, term: (array, name + term))
    return relabel(stacked, f.base, [name, *f.axes], [Index(name, length)])


def while_(ctx: Context, eqn: Any, *values: Value) -> list[Value]:
    p = eqn.params
    a, b = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = values[:a], values[a : a + b], list(values[a + b :])
    inner, test = ctx.child(eqn), ctx.child(eqn, branch=1)
    random = any(n.key is not None for v in values if _is_weight(v) for n in v.networks)

    def body(carry: list[Value], number: Any = None) -> list[Value]:
        consts = body_consts
        if number is not None:
            consts = [fold_dropout_keys(v, number) if _is_weight(v) else v for v in consts]
        return ctx.run(inner, *_compat.open_jaxpr(p["body_jaxpr"]), [*consts, *carry])

    def step(state: tuple[Any, list[Value]]) -> tuple[Any, list[Value]]:
        number, carry = state
        out = body(carry, number)
        out = [v if _is_weight(c) else _form(inner, eqn, [v])[0] for c, v in zip(carry, out, strict=True)]
        return None if number is None else number + 1, out

    def go(state: tuple[Any, list[Value]]) -> jax.Array:
        return ctx.run(test, *_compat.open_jaxpr(p["cond_jaxpr"]), [*cond_consts, *state[1]])[0]

    init = _steady(ctx, eqn, init, body)
    return lax.while_loop(go, step, (jnp.int32(0) if random else None, init))[1]


def shard_map(ctx: Context, eqn: Any, *values: Value) -> list[Value]:
    """Factors are cut as the weight is: each letter by the mesh axes of the weight's axis that it spells."""
    p = eqn.params
    inner = ctx.child(eqn)
    specs, operands = [], []
    for v, spec in zip(values, p["in_specs"], strict=True):
        cut = index_axes(v, spec, p["mesh"]) if _is_weight(v) else None
        if _is_weight(v):
            v = _form(ctx, eqn, [v])[0] if cut is None else _made(v)
        operands.append(v)
        specs.append(spec if cut is None else specs_like(v, spec, cut))
    known = [index_axes(v, s, p["mesh"]) if _is_weight(v) else None for v, s in zip(values, p["in_specs"], strict=True)]

    def fun(*values: Value) -> list[Value]:
        local = [_local(v, cut, p["mesh"]) if _is_weight(v) else v for v, cut in zip(values, known, strict=True)]
        return _form(inner, eqn, ctx.run(inner, *_compat.open_jaxpr(p["jaxpr"]), local))

    return jax.shard_map(
        fun,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=list(p["out_specs"]),
        axis_names=_compat.shard_map_axes(eqn),
        check_vma=p["check_vma"],
    )(*operands)


def _local(f: AdaptedWeight, cut: dict[str, Any] | None, mesh: Any) -> AdaptedWeight:
    """The weight as one device sees it."""
    letters = tuple(x._replace(size=x.size // num_shards((cut or {}).get(x.name), mesh)) for x in f.indices)
    return dataclasses.replace(f, indices=letters)


RULES = {
    "jit": jit,
    "pjit": jit,
    "closed_call": inline,
    "core_call": inline,
    "eval_jaxpr": inline,
    "custom_jvp_call": custom,
    "custom_vjp_call": custom,
    "custom_vmap_call": custom,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    "cond": cond,
    "scan": scan,
    "while": while_,
    "shard_map": shard_map,
}
