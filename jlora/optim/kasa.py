"""The regulariser of KaSA."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods._base import Update
from jlora.methods.kasa import KaSA


def kasa_penalty(adapter: Any, beta: float = 1e-4, gamma: float = 1e-3) -> jax.Array:
    """How large the singular values of the KaSA updates are, and how far A and B are from orthogonal: for the loss.

        sum of beta |e|^2 + gamma (|A^T A - I| + |B B^T - I|),    Frobenius norms, for each update and layer

    Arguments:
        adapter: an adapter, or any tree that contains adapters.
        beta, gamma: the weights of both terms; the defaults are those of the paper's code.

    Returns:
        a scalar, 0 without KaSA updates.

    Example:
        loss = task_loss + jlora.kasa_penalty(adapter)

    Wang et al. 2024, KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, arXiv:2412.06071.
    """
    total = jnp.zeros(())
    for update in jax.tree.leaves(adapter, is_leaf=lambda node: isinstance(node, Update)):
        if isinstance(update, Update) and isinstance(update.method, KaSA):
            a, b = update.joined("a"), update.joined("b")
            distances = _distance_from_identity(a.mT @ a).sum() + _distance_from_identity(b @ b.mT).sum()
            total = total + beta * jnp.sum(jnp.square(update["e"])) + gamma * distances
    return total


def _distance_from_identity(gram: jax.Array) -> jax.Array:
    """|G - I| for each matrix of a stack. Its gradient is zero, not undefined, where G is the identity."""
    squares = jnp.sum(jnp.square(gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)), (-2, -1))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
