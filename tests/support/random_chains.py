"""Random chains of structural operations on a weight, ending in a product, as hypothesis draws them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

Op = tuple[Any, ...]  # a name and static arguments


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the weight as the chain goes on.

    Arguments:
        size: its size.
        role: what the final product does with it.
        parts: the axes that it joins where they are of different kinds; such an axis can only be taken apart again.
        origin: whether it still stands for an axis of a parameter (an axis of size one may lose that).
        carried: whether the update varies along it; it does not along an axis that was broadcast.
    """

    size: int
    role: str
    parts: tuple[Axis, ...] = ()
    origin: bool = True
    carried: bool = True

    @property
    def kind(self) -> tuple[Any, ...]:
        """Axes of one kind stay one letter when they are joined, so that they can be cut afterwards."""
        return (self.role, self.origin, self.carried)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A weight, what is done to it, and the product that consumes it.

    Arguments:
        shape: of the weight `w`.
        others: shapes of further weights that are added or concatenated.
        ops: the chain.
        end: the shape at the end.
        roles: for every axis at the end, its role in the product.
        rank: of the update.
        seed: of all numbers.
        low: whether the chain casts to bfloat16 on its way.
        conv: whether the product is a convolution; its only `out` axis are the output channels.
    """

    shape: tuple[int, ...]
    others: dict[str, tuple[int, ...]]
    ops: tuple[Op, ...]
    end: tuple[int, ...]
    roles: tuple[str, ...]
    rank: int
    seed: int
    low: bool = False
    conv: bool = False


def vector(shape: tuple[int, ...], seed: int, dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(0.5, 1.5, shape), dtype)


def apply(op: Op, w: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    """One step of a chain."""
    name, *args = op
    return _APPLY[name](w, *args) if name not in ("add", "sub", "concat") else _JOIN[name](w, params, *args)


def _cast(w: jax.Array, dtype: str) -> jax.Array:
    return w.astype(dtype).astype(jnp.float32)


def _concat(w: jax.Array, params: dict[str, jax.Array], other: Any, axis: int, first: bool) -> jax.Array:
    v = params[other] if isinstance(other, str) else vector(other[0], other[1], w.dtype)
    return lax.concatenate([v, w] if first else [w, v], axis)


def _halves(w: jax.Array, axis: int, at: int, keep: int) -> jax.Array:
    return lax.split(w, (at, w.shape[axis] - at), axis)[keep]


_APPLY: dict[str, Callable[..., jax.Array]] = {
    "transpose": lax.transpose,
    "reshape": lax.reshape,
    "rev": lambda w, axes: lax.rev(w, axes),
    "slice": lambda w, start, limit, strides: lax.slice(w, start, limit, strides),
    "split": _halves,
    "pad": lambda w, value, config: lax.pad(w, jnp.asarray(value, w.dtype), config),
    "expand": lax.expand_dims,
    "squeeze": lax.squeeze,
    "broadcast": lax.broadcast_in_dim,
    "cast": _cast,
    "neg": lambda w: -w,
    "scale": lambda w, value: w * value,
    "unscale": lambda w, value: w / value,
    "times": lambda w, shape, seed, across: w * vector(shape, seed, w.dtype),
    "over": lambda w, shape, seed, across: w / vector(shape, seed, w.dtype),
    "mirror": lambda w, axis: lax.concatenate([w, lax.rev(w, (axis,))], axis),
    "take": lambda w, indices, axis: jnp.take(w, jnp.array(indices), axis),
    "dynamic_slice": lambda w, start, size, axis: lax.dynamic_slice_in_dim(w, jnp.int32(start), size, axis),
    "barrier": lax.optimization_barrier,
    "stop": lambda w: lax.stop_gradient(w) + w,
    # what has no factored form:
    "tanh": jnp.tanh,
    "cumsum": lambda w, axis: lax.cumsum(w, axis),
    "select": lambda w, seed: jnp.where(vector(w.shape, seed, w.dtype) > 1, w, -w),
    "shift": lambda w, seed: w + vector(w.shape, seed, w.dtype),
    "square": lambda w: w * w,
}

_JOIN: dict[str, Callable[..., jax.Array]] = {
    "add": lambda w, params, other: w + params[other],
    "sub": lambda w, params, other: params[other] - w,
    "concat": _concat,
}


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)


def _is_matrix(axes: list[Axis]) -> bool:
    return sum(a.origin and a.size > 1 and not a.parts for a in axes) > 1


@st.composite
def factored_chains(draw: st.DrawFn) -> Chain:
    """Chains that must stay factored: only axes that are one index of the update are cut."""
    roles = draw(st.permutations(["in", "out", *draw(st.lists(st.sampled_from(["in", "out", "stack"]), max_size=2))]))
    axes = [Axis(draw(st.sampled_from([1, 2, 3, 4, 6])), role) for role in roles]
    shape = tuple(a.size for a in axes)
    low = draw(st.integers(0, 4)) == 0
    others: dict[str, tuple[int, ...]] = {}
    ops: list[Op] = []
    for _ in range(draw(st.integers(1, 7))):
        step = draw(st.sampled_from(_possible(axes, low)))
        op, axes = step(draw, axes, others)
        ops.append(op)
    end = tuple(a.size for a in axes)
    # A convolution wants each factor on one side, and no axis that was looked up: the update is stacked along it.
    across = any((op[0] in ("times", "over") and op[-1]) or op[0] == "take" for op in ops)
    is_kernel = 3 <= len(axes) <= 5 and sorted(a.role for a in axes) == [*["in"] * (len(axes) - 1), "out"]
    conv = is_kernel and not across and all(not a.parts and a.carried for a in axes) and draw(st.booleans())
    n_in = math.prod(n for n, r in zip(shape, roles, strict=True) if r == "in")
    n_out = math.prod(n for n, r in zip(shape, roles, strict=True) if r == "out")
    rank = draw(st.integers(1, min(n_in, n_out, 3)))
    return Chain(shape, others, tuple(ops), end, tuple(a.role for a in axes), rank, draw(seeds()), low, conv)


Step = Callable[[st.DrawFn, list[Axis], dict[str, tuple[int, ...]]], tuple[Op, list[Axis]]]


def _possible(axes: list[Axis], low: bool) -> list[Step]:
    plain = all(not a.parts for a in axes)
    single = [k for k, a in enumerate(axes) if not a.parts]
    steps: list[Step] = [_transpose, _rev, _neg, _expand, _barrier]
    if len(axes) < 7:
        steps += [_broadcast]
    if any(axes[k].size in (4, 6, 8, 9, 12) for k in single) and len(axes) < 7:
        steps += [_split_axis, _split_axis]
    if len(axes) > 1:
        steps += [_join_axes, _join_axes]
    if not plain:
        steps += [_take_apart] * 3
    if any(a.size == 1 for a in axes):
        steps += [_squeeze]
    if any(axes[k].size > 1 for k in single):
        steps += [_slice, _halve, _dynamic_slice]
    if single and math.prod(a.size for a in axes) < 2000:
        steps += [_pad]
    if any(axes[k].carried for k in single):
        steps += [_take]
    if low:
        steps += [_to_bfloat16]
    if _is_matrix(axes):
        steps += [_scale]
        if plain and math.prod(a.size for a in axes) < 2000:
            steps += [_concat_step, _concat_step, _add, _mirror, _stop]
            steps += [] if low else [_sub]  # in low precision no sum may cancel
        if single and sum(a.size > 1 for a in axes) > 1:
            steps += [_times]
    return steps


def _transpose(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    order = draw(st.permutations(range(len(axes))))
    return ("transpose", tuple(order)), [axes[k] for k in order]


def _rev(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    which = draw(st.sets(st.integers(0, len(axes) - 1), min_size=1)) if axes else set()
    return ("rev", tuple(sorted(which))), axes


def _neg(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("neg",), axes


def _barrier(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("barrier",), axes


def _to_bfloat16(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("cast", "bfloat16"), axes


def _expand(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.integers(0, len(axes)))
    new = Axis(1, draw(st.sampled_from(["in", "out", "stack"])), origin=False, carried=False)
    return ("expand", (k,)), [*axes[:k], new, *axes[k:]]


def _broadcast(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """A new axis, and perhaps axes of size one that grow."""
    k = draw(st.integers(0, len(axes)))
    new = Axis(draw(st.integers(1, 3)), draw(st.sampled_from(["in", "out", "stack"])), origin=False, carried=False)
    grown = [
        dataclasses.replace(a, size=draw(st.integers(1, 3)), origin=False, carried=False, parts=())
        if a.size == 1
        else a
        for a in axes
    ]
    out = [*grown[:k], new, *grown[k:]]
    return ("broadcast", tuple(a.size for a in out), tuple(j for j in range(len(out)) if j != k)), out


def _reshaped(axes: list[Axis]) -> tuple[Op, list[Axis]]:
    """After a reshape, axes of size one stand for no parameter's axis."""
    out = [dataclasses.replace(a, origin=False, carried=False) if a.size == 1 else a for a in axes]
    return ("reshape", tuple(a.size for a in axes)), out


def _split_axis(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts and a.size in (4, 6, 8, 9, 12)]))
    axis = axes[k]
    major = draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
    two = [dataclasses.replace(axis, size=major), dataclasses.replace(axis, size=axis.size // major)]
    return _reshaped([*axes[:k], *two, *axes[k + 1 :]])


def _join_axes(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """Joins neighbours. Those of one kind are one index again; others are only taken apart where they were joined."""
    k = draw(st.integers(0, len(axes) - 2))
    a, b = axes[k], axes[k + 1]
    size = a.size * b.size
    if b.size == 1 or a.size == 1:
        joined = a if b.size == 1 else b
    elif a.kind == b.kind and not a.parts and not b.parts and a.carried:
        joined = dataclasses.replace(a, size=size)
    else:
        joined = Axis(size, a.role, parts=(*(a.parts or (a,)), *(b.parts or (b,))))
    return _reshaped([*axes[:k], joined, *axes[k + 2 :]])


def _take_apart(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return _reshaped([part for a in axes for part in (a.parts or (a,))])


def _squeeze(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    gone = draw(st.sets(st.sampled_from([k for k, a in enumerate(axes) if a.size == 1]), min_size=1))
    return ("squeeze", tuple(sorted(gone))), [a for k, a in enumerate(axes) if k not in gone]


def _cuttable(draw: st.DrawFn, axes: list[Axis]) -> int:
    return draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts and a.size > 1]))


def _resized(axes: list[Axis], k: int, size: int, **changes: Any) -> list[Axis]:
    return [*axes[:k], dataclasses.replace(axes[k], size=size, **changes), *axes[k + 1 :]]


def _slice(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = _cuttable(draw, axes)
    start = draw(st.integers(0, axes[k].size - 1))
    limit = draw(st.integers(start + 1, axes[k].size))
    stride = draw(st.integers(1, 3))
    starts = tuple(start if j == k else 0 for j in range(len(axes)))
    limits = tuple(limit if j == k else a.size for j, a in enumerate(axes))
    strides = tuple(stride if j == k else 1 for j in range(len(axes)))
    return ("slice", starts, limits, strides), _resized(axes, k, -(-(limit - start) // stride))


def _halve(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = _cuttable(draw, axes)
    at, keep = draw(st.integers(1, axes[k].size - 1)), draw(st.integers(0, 1))
    return ("split", k, at, keep), _resized(axes, k, axes[k].size - at if keep else at)


def _dynamic_slice(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = _cuttable(draw, axes)
    size = draw(st.integers(1, axes[k].size))
    return ("dynamic_slice", draw(st.integers(-2, axes[k].size + 2)), size, k), _resized(axes, k, size)


def _pad(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts]))
    low, inner = draw(st.integers(-1 if axes[k].size > 1 else 0, 2)), draw(st.integers(0, 2))
    high = draw(st.integers(-1 if axes[k].size > 2 else 0, 2))
    size = axes[k].size + low + high + (axes[k].size - 1) * inner
    config = tuple((low, high, inner) if j == k else (0, 0, 0) for j in range(len(axes)))
    return ("pad", draw(st.sampled_from([0.0, 0.75])), config), _resized(axes, k, size, carried=True)


def _take(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    k = draw(st.sampled_from([k for k, a in enumerate(axes) if not a.parts and a.carried]))
    indices = draw(st.lists(st.integers(-axes[k].size, axes[k].size - 1), min_size=1, max_size=4))
    return ("take", tuple(indices), k), _resized(axes, k, len(indices), origin=False)


def _scale(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return (draw(st.sampled_from(["scale", "unscale"])), draw(st.sampled_from([0.5, 1.7, -1.3]))), axes


def _times(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """A vector along some axes; along all of them it would be a matrix."""
    long = [k for k, a in enumerate(axes) if a.size > 1]
    may = [k for k in long if not axes[k].parts]
    along = draw(st.sets(st.sampled_from(may), max_size=len(long) - 1)) if may else set()
    across = len({axes[k].role for k in along}) > 1  # then the vector is no factor of one side of the update
    shape = tuple(a.size if k in along else 1 for k, a in enumerate(axes))
    out = [dataclasses.replace(a, carried=True) if k in along else a for k, a in enumerate(axes)]
    return (draw(st.sampled_from(["times", "over"])), shape, draw(seeds()), across), out


def _concat_step(draw: st.DrawFn, axes: list[Axis], others: dict[str, tuple[int, ...]]) -> tuple[Op, list[Axis]]:
    k, more = draw(st.integers(0, len(axes) - 1)), draw(st.integers(1, 2))
    shape = tuple(more if j == k else a.size for j, a in enumerate(axes))
    if draw(st.booleans()) and math.prod(shape) > max(shape):
        name: Any = f"v{len(others)}"
        others[name] = shape
    else:
        name = (shape, draw(seeds()))
    joined = [dataclasses.replace(a, carried=True) if a.size > 1 or j == k else a for j, a in enumerate(axes)]
    return ("concat", name, k, draw(st.booleans())), _resized(joined, k, axes[k].size + more)


def _add(draw: st.DrawFn, axes: list[Axis], others: dict[str, tuple[int, ...]]) -> tuple[Op, list[Axis]]:
    name = f"v{len(others)}"
    others[name] = tuple(a.size for a in axes)
    return ("add", name), axes


def _sub(draw: st.DrawFn, axes: list[Axis], others: dict[str, tuple[int, ...]]) -> tuple[Op, list[Axis]]:
    (_, name), axes = _add(draw, axes, others)
    return ("sub", name), axes


def _mirror(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    """The weight beside its own reverse: one parameter twice in one operand."""
    k = draw(st.integers(0, len(axes) - 1))
    joined = [dataclasses.replace(a, carried=True) if a.size > 1 or j == k else a for j, a in enumerate(axes)]
    return ("mirror", k), _resized(joined, k, 2 * axes[k].size)


@st.composite
def any_chains(draw: st.DrawFn) -> Chain:
    """Chains of whatever fits, factored or not."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    now, ops = shape, []
    for _ in range(draw(st.integers(1, 6))):
        axes = [Axis(n, "in") for n in now]
        op, _ = draw(st.sampled_from(_whatever(now)))(draw, axes, {})
        out = jax.eval_shape(lambda w, op=op: apply(op, w, {}), jax.ShapeDtypeStruct(now, jnp.float32))
        if out.size < 3000:
            ops.append(op)
            now = out.shape
    roles = tuple(draw(st.sampled_from(["in", "out", "stack"])) for _ in now)
    return Chain(shape, {}, tuple(ops), now, roles, 1, draw(seeds()))


def _whatever(shape: tuple[int, ...]) -> list[Step]:
    steps: list[Step] = [_expand, _neg, _scale, _tanh, _square, _stop, _reshape, _reshape, _select, _shift]
    if shape:
        steps += [_transpose, _rev, _pad, _take, _times_any, _cumsum]
    if any(n > 1 for n in shape):
        steps += [_slice, _halve, _dynamic_slice]
    if 1 in shape:
        steps += [_squeeze]
    if len(shape) < 6:
        steps += [_broadcast]
    return steps


def _tanh(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("tanh",), axes


def _square(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("square",), axes


def _stop(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("stop",), axes


def _select(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("select", draw(seeds())), axes


def _shift(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("shift", draw(seeds())), axes


def _cumsum(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("cumsum", draw(st.integers(0, len(axes) - 1))), axes


def _times_any(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    return ("times", tuple(draw(st.sampled_from([1, a.size])) for a in axes), draw(seeds()), True), axes


def _reshape(draw: st.DrawFn, axes: list[Axis], others: Any) -> tuple[Op, list[Axis]]:
    left, sizes = math.prod(a.size for a in axes), []
    while left > 1 and len(sizes) < 4:
        sizes.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= sizes[-1]
    return ("reshape", (*sizes, left)), axes
