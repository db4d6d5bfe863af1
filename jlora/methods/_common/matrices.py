"""A weight as a matrix `(*stack, in, out)`, and checks of hyper-parameters against its size."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._interpreter.context import Role, matrix_side
from jlora._interpreter.site import Site
from jlora._ir.materialize import accumulation_dtype, dense
from jlora._ir.weight import AdaptedWeight


def as_matrix(array: jax.Array, roles: Sequence[Role]) -> jax.Array:
    """A weight's value as `(*stack, in, out)`, the in and the out axes joined, in float32 or wider.

    Arguments:
        array: the value.
        roles: the role of every axis.
    """
    order = [axis for role in ("stack", "in", "out") for axis, r in enumerate(roles) if matrix_side(r) == role]
    stack = [n for n, r in zip(array.shape, roles, strict=True) if r == "stack"]
    n_in = math.prod(n for n, r in zip(array.shape, roles, strict=True) if matrix_side(r) == "in")
    return array.transpose(order).reshape(*stack, n_in, -1).astype(max(array.dtype, jnp.dtype(jnp.float32), key=_bits))


def dense_matrix(w: AdaptedWeight, roles: Sequence[Role]) -> jax.Array:
    """The materialised weight as a matrix, `(*stack, in, out)`.

    Arguments:
        w: the weight, with the updates that it has so far.
        roles: the role of every axis.
    """
    return as_matrix(jnp.asarray(dense(w, accumulation_dtype(w.dtype))), roles)


def in_out(site: Site) -> tuple[int, int]:
    """The product of the sizes of a site's in axes, and that of its out axes."""
    return math.prod(site.sizes("in")), math.prod(site.sizes("out"))


def nearest(value: int, limit: int, fits: Callable[[int], bool]) -> str:
    """The numbers nearest to a value that fit, at most four, for errors: "2, 4, 8".

    Arguments:
        value: the number that does not fit.
        limit: the largest number that may fit; the smallest is 1.
        fits: whether a number does.
    """
    fitting = [n for n in range(1, limit + 1) if fits(n)]
    return ", ".join(map(str, sorted(sorted(fitting, key=lambda n: abs(n - value))[:4]))) or "none"


def rank_too_high(site: Site, rank: int) -> str:
    """Why a rank is too high for a site; empty if it is not."""
    n_in, n_out = in_out(site)
    if rank <= min(n_in, n_out):
        return ""
    return f"rank {rank} is above the smaller of its in size {n_in} and out size {n_out}; lower the rank"


def too_large_to_number(n_in: int, n_out: int) -> str:
    """Why the entries of a matrix cannot be numbered by integers of 32 bits; empty if they can."""
    if n_in * n_out < 2**31:
        return ""
    return f"{n_in} x {n_out} entries are more than integers of 32 bits can number; choose another method for it"


def too_many_entries(site: Site, count: int) -> str:
    """Why entries of a site cannot be drawn: there are too few of them, or too many to number; empty if they can."""
    n_in, n_out = in_out(site)
    if reason := too_large_to_number(n_in, n_out):
        return reason
    return "" if count <= n_in * n_out else f"{count} entries are more than its {n_in} x {n_out}; lower their number"


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits
