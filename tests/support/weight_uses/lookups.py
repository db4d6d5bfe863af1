"""Lookups, with indices out of bounds in the modes for which JAX defines them: fill, clip and wrap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.weight_uses.kind import Array, Params, bend, ids, kind

ROWS = ids([0, 3, 3], [6, 1, -2])  # from the end, too
STRAY = ids([0, -1, 3], [9, -9, 6])  # on both sides of a table of seven or eight rows


@kind((8, 4), x=(2, 3, 4), rows=STRAY)
def take_fill(p: Params, x: Array, rows: Array) -> Array:
    return jnp.take(p["w"], rows, axis=0) * x  # not-a-number in the rows out of bounds


@kind((8, 4), x=(2, 3, 4), rows=STRAY)
def take_clip(p: Params, x: Array, rows: Array) -> Array:
    return jnp.take(p["w"], rows, axis=0, mode="clip") * x


@kind((7, 4), x=(2, 3, 4), rows=STRAY)
def take_wrap(p: Params, x: Array, rows: Array) -> Array:
    return jnp.take(p["w"], rows, axis=0, mode="wrap") * x


@kind((4, 7), x=(4, 2, 3), rows=STRAY)
def take_columns(p: Params, x: Array, rows: Array) -> Array:
    return p["w"].at[:, rows].get(mode="fill", fill_value=2.5) * x


@kind((8, 4), x=(2, 3, 4), rows=ROWS)
def index(p: Params, x: Array, rows: Array) -> Array:
    return p["w"][rows] * x


@kind((7, 4), x=(4,), row=ids(5))
def index_of_one_row(p: Params, x: Array, row: Array) -> Array:
    return p["w"].at[row[0]].get(mode="promise_in_bounds") * x


@kind((7, 2, 3), x=(3, 2, 3), rows=ids(1, 6, 6))
def index_of_heads(p: Params, x: Array, rows: Array) -> Array:
    return p["w"][rows] * x


@kind((3, 5, 4), x=(2, 4), rows=ids(1, 2), places=ids(4, 0))
def index_by_two_numbers(p: Params, x: Array, rows: Array, places: Array) -> Array:
    return p["w"][rows, places] * x


@kind((3, 7, 4), x=(3, 2, 4), rows=ids([1, 6], [0, 0], [5, 2]))
def index_in_each_table(p: Params, x: Array, rows: Array) -> Array:
    return jax.vmap(lambda table, r: table[r])(p["w"], rows) * x


@kind((7, 4), x=(4,), row=ids(6))
def dynamic_slice_of_a_row(p: Params, x: Array, row: Array) -> Array:
    return lax.dynamic_slice(p["w"], (row[0], 0), (1, 4))[0] * x


@kind((7, 4), x=(2, 4), row=ids(6))
def dynamic_slice_of_rows(p: Params, x: Array, row: Array) -> Array:
    return x @ lax.dynamic_slice(p["w"], (row[0], 0), (3, 4)).T  # the start is clamped to 4


@kind((7, 4), x=(2, 3, 4), rows=ROWS)
def tied_embedding(p: Params, x: Array, rows: Array) -> Array:
    return bend(p["w"][rows] + x) @ p["w"].T
