"""Thin matrices that are tiled to the size of a weight, as low-rank products with stacked identities.

A [I ... I]    repeats the columns of A,    [I; ...; I] B    the rows of B
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora.methods._common.matrices import in_out, nearest


def identities(rank: int, n: int, dtype: DTypeLike) -> jax.Array:
    """[I; ...; I] of height n, whose transpose is [I ... I]."""
    return jnp.tile(jnp.eye(rank, dtype=dtype), (n // rank, 1))


def product(downs: Sequence[jax.Array], ups: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The elementwise product of sums Aj [I ... I] + [I; ...; I] Bj, multiplied out into one pair of matrices.

    For k sums of rank r the pair has rank 2 r + (2^k - 2) r^2. Networks of the blocks that are tiled have fewer FLOPs,
    but take twice the time and memory: their last products are batches of small matmuls.

    Arguments:
        downs: the matrices Aj, (*stack, in, rank).
        ups: the matrices Bj, (*stack, rank, out).
    """
    *stack, n_in, rank = downs[0].shape
    rows, columns = identities(rank, n_in, downs[0].dtype), identities(rank, ups[0].shape[-1], ups[0].dtype).T
    rows, columns = (jnp.broadcast_to(matrix, (*stack, *matrix.shape)) for matrix in (rows, columns))
    all_downs, all_ups = [], []
    for choice in itertools.product((True, False), repeat=len(downs)):
        # The product of tiled As is the tiled product of the As, so the chosen As are one matrix; likewise the Bs.
        a = [down for down, chosen in zip(downs, choice, strict=True) if chosen]
        b = [up for up, chosen in zip(ups, choice, strict=True) if not chosen]
        down, up = functools.reduce(jnp.multiply, a or [rows]), functools.reduce(jnp.multiply, b or [columns])
        if a and b:
            down, up = every_column(down, rows), every_row(columns, up)
        all_downs.append(down)
        all_ups.append(up)
    return jnp.concatenate(all_downs, axis=-1), jnp.concatenate(all_ups, axis=-2)


def every_column(x: jax.Array, y: jax.Array) -> jax.Array:
    """The elementwise product of every column of one matrix with every column of another."""
    out = x[..., :, :, None] * y[..., :, None, :]
    return out.reshape(*out.shape[:-2], -1)


def every_row(x: jax.Array, y: jax.Array) -> jax.Array:
    """The elementwise product of every row of one matrix with every row of another."""
    out = x[..., :, None, :] * y[..., None, :, :]
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def unsupported_reason(site: Site, rank: int, name: str, *, both: bool = True) -> str:
    """Why a rank does not divide a site's in (and out) size, with the nearest that do; empty if it divides them."""
    n_in, n_out = in_out(site)
    sizes = {"in": n_in, "out": n_out} if both else {"in": n_in}
    for side, size in sizes.items():
        if size % rank:
            would = nearest(rank, size, lambda n: not any(other % n for other in sizes.values()))
            return f"{name} {rank} does not divide its {side} size {size}; {would} would do"
    return ""
