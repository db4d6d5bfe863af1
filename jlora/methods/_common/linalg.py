"""Inverses of many small matrices at once."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def inverse(matrix: jax.Array) -> jax.Array:
    """The inverse of each matrix of a stack, by Gauss-Jordan elimination.

    No pivots are sought: the symmetric part has to be positive definite, then all pivots are positive. LAPACK has the
    same in one call, but on CPUs of few cores two such calls at a time wait for each other for ever in jaxlib 0.10.

    Arguments:
        matrix: (*stack, n, n).
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
    found = inverse(primals[0])
    with jax.default_matmul_precision("highest"):
        return found, -(found @ tangents[0] @ found)


def identity_like(like: jax.Array) -> jax.Array:
    """The identity in place of each matrix of a stack."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)
