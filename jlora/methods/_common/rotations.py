"""Rotations of the rows of a matrix, in blocks."""

import jax
import jax.numpy as jnp

from jlora.methods._common.linalg import identity_like, inverse
from jlora.methods._common.matrices import nearest


def unsupported_reason(n_in: int, block: int, levels: int = 1) -> str:
    """Why blocks do not divide the in size, with block sizes that do; empty if they divide it."""
    if n_in % (block * 2 ** (levels - 1)) == 0:
        return ""
    step = 1 if levels == 1 else 2
    would = nearest(block, n_in, lambda b: b > 1 and b % step == 0 and n_in % (b * 2 ** (levels - 1)) == 0)
    product = f"{block} * {2 ** (levels - 1)}" if levels > 1 else str(block)
    return f"{product} does not divide its in size {n_in}; blocks that do: {would}"


def angles(block: int) -> int:
    """How many numbers an antisymmetric matrix of this size has above its diagonal."""
    return block * (block - 1) // 2


def rotate_rows(matrix: jax.Array, angles: jax.Array, block: int, distance: int = 1) -> jax.Array:
    """Rotates each block of rows by (I - Q) (I + Q)^-1, with Q the antisymmetric matrix of the block.

    Arguments:
        matrix: (*stack, in, out).
        angles: the entries above the diagonal of each Q, (*stack, in / block, block (block - 1) / 2).
        block: rows in a block.
        distance: between the two halves of a block, in half blocks: 1 for blocks of neighbours.
    """
    *stack, _, n_out = matrix.shape
    shape = (-1, 1, 1, block) if distance == 1 else (-1, 2, distance, block // 2)
    halves = matrix.reshape(*stack, *shape, n_out).swapaxes(-4, -3)
    blocks = halves.reshape(*stack, -1, block, n_out)
    blocks = jnp.matmul(cayley(angles.astype(matrix.dtype), block), blocks, precision=jax.lax.Precision.HIGHEST)
    return blocks.reshape(halves.shape).swapaxes(-4, -3).reshape(matrix.shape)


def cayley(angles: jax.Array, block: int, terms: int = 0) -> jax.Array:
    """The rotation (I - Q) (I + Q)^-1 = 2 (I + Q)^-1 - I of every block, (*blocks, block, block).

    Arguments:
        angles: the entries above the diagonal of each Q, (*blocks, block (block - 1) / 2).
        block: the size of the blocks.
        terms: of the series I - 2 Q + 2 Q^2 - ... in the place of the inverse, the last one without the 2; 0 inverts.
    """
    rows, columns = jnp.triu_indices(block, 1)
    q = jnp.zeros((*angles.shape[:-1], block, block), angles.dtype).at[..., rows, columns].set(angles)
    q = q - q.mT
    identity = identity_like(q)
    if not terms:
        return 2 * inverse(identity + q) - identity
    total, power = identity, identity
    for k in range(1, terms):
        power = -jnp.matmul(power, q, precision=jax.lax.Precision.HIGHEST)
        total = total + (power if k == terms - 1 else 2 * power)
    return total


def butterfly(angles: jax.Array, block: int) -> jax.Array:
    """The product of several levels of rotations, which is block-diagonal: (*stack, blocks / 2^(levels - 1), n, n).

    Arguments:
        angles: (*stack, levels, blocks, block (block - 1) / 2). A block of level j joins two half blocks that are
            2^(j - 1) half blocks apart.
        block: the size of the blocks of one level; n is block 2^(levels - 1).
    """
    *stack, levels, blocks, _ = angles.shape
    size = block * 2 ** (levels - 1)
    shape = (*stack, blocks * block // size, size, size)
    product = jnp.broadcast_to(jnp.eye(size, dtype=angles.dtype), shape).reshape(*stack, -1, size)
    for level in range(levels):
        product = rotate_rows(product, angles[..., level, :, :], block, 2**level)
    return product.reshape(shape)
