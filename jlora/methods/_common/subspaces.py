"""Projections onto subspaces of a weight's out space, without materialising them."""

import jax

from jlora._ir.weight import AdaptedWeight
from jlora.methods._common.linalg import inverse
from jlora.methods._common.matrices import dense_matrix
from jlora.methods._common.networks import UpdateLike


def image(matrix: jax.Array, p: jax.Array, projection: str) -> jax.Array:
    """W D, (*stack, in, rank), such that W D P is what P takes of the weight.

    Arguments:
        matrix: the weight W, (*stack, in, out).
        p: P, (*stack, rank, out).
        projection: "relu", D = relu(P)^T, or "qr", D = P^T (P P^T)^-1.
    """
    p = p.astype(matrix.dtype)
    with jax.default_matmul_precision("highest"):
        if projection == "relu":
            return matrix @ jax.nn.relu(p).mT
        return (matrix @ p.mT) @ inverse(p @ p.mT)


def image_of(w: AdaptedWeight, update: UpdateLike, p: jax.Array, projection: str) -> jax.Array:
    """The same of an adapted weight.

    Arguments:
        w, update: the weight and its update.
        p, projection: as for `image`.
    """
    return image(dense_matrix(w, update.roles), p, projection)
