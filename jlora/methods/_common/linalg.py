"""Inverses of many small matrices at once."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def inverse(matrix: jax.Array) -> jax.Array:
    """The inverse of each matrix of a stack, by Gauss-Jordan elimination.

    It does not pivot. The symmetric part must be positive definite: then all pivots are positive. LAPACK has this as
    one call, but on CPUs with few cores two such calls at a time can deadlock in jaxlib 0.10.

    Arguments:
        matrix: (*stack, n, n).

    Returns:
        the inverses, (*stack, n, n).
    """
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, matrix.shape, matrix.ndim - 2 + axis) for axis in (0, 1))

    def eliminate(k: jax.Array, m: jax.Array) -> jax.Array:
        row, column = (jax.lax.dynamic_index_in_dim(m, k, axis) for axis in (-2, -1))
        pivot = jax.lax.dynamic_index_in_dim(row, k, -1)
        row = jnp.where(columns[..., :1, :] == k, 1, row) / pivot
        column = jnp.where(rows[..., :1] == k, -1, column)
        return jnp.where((rows == k) | (columns == k), 0, m) - column * row

    return jax.lax.fori_loop(0, matrix.shape[-1], eliminate, matrix)


@inverse.defjvp
def _inverse_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    inverted = inverse(primals[0])
    with jax.default_matmul_precision("highest"):
        return inverted, -(inverted @ tangents[0] @ inverted)


def identity_like(like: jax.Array) -> jax.Array:
    """The identity matrix for each matrix of a stack, in the shape and dtype of `like`."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)
