"""Thin matrices that are repeated to a weight's size, as low-rank products with the identities that repeat them.

A [I ... I]    repeats the columns of A,    [I; ...; I] B    the rows of B
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora.methods._common.matrices import in_out


def identities(rank: int, n: int, dtype: Any) -> jax.Array:
    """[I; ...; I] of height n, whose transpose is [I ... I]."""
    return jnp.tile(jnp.eye(rank, dtype=dtype), (n // rank, 1))


def product(downs: Sequence[jax.Array], ups: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The elementwise product of sums Aj [I ... I] + [I; ...; I] Bj, multiplied out into one pair of matrices.

    Of k sums r wide the pair has rank 2 r + (2^k - 2) r^2. Networks of the repeated blocks themselves have fewer FLOPs
    and take twice the time and memory: their last products run over batches of small ones.
    """
    *stack, n_in, rank = downs[0].shape
    rows, columns = identities(rank, n_in, downs[0].dtype), identities(rank, ups[0].shape[-1], ups[0].dtype).T
    rows, columns = (jnp.broadcast_to(one, (*stack, *one.shape)) for one in (rows, columns))
    left, right = [], []
    for choice in itertools.product((True, False), repeat=len(downs)):
        # What is repeated alike multiplies alike, so the chosen As are one matrix, and so are the chosen Bs.
        a = [down for down, chosen in zip(downs, choice, strict=True) if chosen]
        b = [up for up, chosen in zip(ups, choice, strict=True) if not chosen]
        down, up = functools.reduce(jnp.multiply, a or [rows]), functools.reduce(jnp.multiply, b or [columns])
        if a and b:
            down, up = every_column(down, rows), every_row(columns, up)
        left.append(down)
        right.append(up)
    return jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-2)


def every_column(x: jax.Array, y: jax.Array) -> jax.Array:
    """Every column of one matrix times every column of another."""
    out = x[..., :, :, None] * y[..., :, None, :]
    return out.reshape(*out.shape[:-2], -1)


def every_row(x: jax.Array, y: jax.Array) -> jax.Array:
    """Every row of one matrix times every row of another."""
    out = x[..., :, None, :] * y[..., None, :, :]
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def unsupported_reason(site: Site, rank: int, name: str, *, both: bool = True) -> str:
    """Why matrices of a rank do not fill a site's in (and out) axes, with the nearest that do; empty where they do."""
    sizes = dict(zip(("in", "out"), in_out(site), strict=True))
    for side, size in sizes.items() if both else [("in", sizes["in"])]:
        if size % rank:
            common = math.gcd(*sizes.values()) if both else size
            good = [n for n in range(1, common + 1) if common % n == 0]
            would = ", ".join(map(str, sorted(sorted(good, key=lambda n: abs(n - rank))[:4])))
            return f"{name} {rank} does not divide its {side} size {size}; {would} would do"
    return ""
