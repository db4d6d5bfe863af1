"""Rotations of a matrix's rows, a block of them at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods._common.linalg import identity_like, inverse


def unsupported_reason(n_in: int, block: int, levels: int = 1) -> str:
    """Why blocks do not fit an in space; empty where they do."""
    if n_in % (block * 2 ** (levels - 1)) == 0:
        return ""
    step = 1 if levels == 1 else 2
    good = [b for b in range(2, n_in + 1, step) if n_in % (b * 2 ** (levels - 1)) == 0]
    would = ", ".join(map(str, sorted(sorted(good, key=lambda b: abs(b - block))[:4]))) or "none"
    product = f"{block} * {2 ** (levels - 1)}" if levels > 1 else str(block)
    return f"{product} does not divide its in size {n_in}; blocks that do: {would}"


def start(shape: tuple[int, ...], block: int, dtype: Any) -> jax.Array:
    """The numbers above the diagonals of antisymmetric matrices, one for each of `shape`: these turn nothing."""
    return jnp.zeros((*shape, block * (block - 1) // 2), dtype)


def turned(matrix: jax.Array, numbers: jax.Array, block: int, apart: int = 1) -> jax.Array:
    """Turns each block of rows by (I - Q) (I + Q)^-1, Q its antisymmetric matrix.

    Arguments:
        matrix: (*stack, in, out).
        numbers: those above the diagonal of each block's Q, (*stack, in / block, block (block - 1) / 2).
        block: rows a block.
        apart: how far the halves of a block lie from each other, in halves: 1 for blocks of neighbours.
    """
    *stack, _, n_out = matrix.shape
    shape = (-1, 1, 1, block) if apart == 1 else (-1, 2, apart, block // 2)
    halves = matrix.reshape(*stack, *shape, n_out).swapaxes(-4, -3)
    blocks = halves.reshape(*stack, -1, block, n_out)
    blocks = jnp.matmul(_cayley(numbers.astype(matrix.dtype), block), blocks, precision=jax.lax.Precision.HIGHEST)
    return blocks.reshape(halves.shape).swapaxes(-4, -3).reshape(matrix.shape)


def _cayley(numbers: jax.Array, block: int) -> jax.Array:
    rows, columns = jnp.triu_indices(block, 1)
    q = jnp.zeros((*numbers.shape[:-1], block, block), numbers.dtype).at[..., rows, columns].set(numbers)
    q = q - q.mT
    one = identity_like(q)
    return 2 * inverse(one + q) - one  # I - Q is 2 I - (I + Q)
