"""A chain of operations on a weight: its axes, its steps, and how each step is applied."""

from __future__ import annotations

import dataclasses
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
