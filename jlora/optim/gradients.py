"""Parts of optimisers that know which factor is which, as optax gradient transformations."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora._ir.materialize import accumulation_dtype
from jlora.methods._base import Update
from jlora.methods._common.linalg import identity_like, inverse
from jlora.methods.lora import LoRA


def _is_update(node: Any) -> bool:
    return isinstance(node, Update)


def _stateless(fn: Callable[[Update, Update], Update]) -> optax.GradientTransformation:
    """Applies `fn(gradients, parameters)` to every update, wherever it is in the tree."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("This transformation looks at the factors: call update(gradients, state, params).")
        new = jax.tree.map(lambda g, p: fn(g, p) if _is_update(p) else g, updates, params, is_leaf=_is_update)
        return new, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Gives B a higher learning rate than A: put it last, `optax.chain(optax.adamw(1e-4), jlora.lora_plus(16))`.

        B <- B + ratio dB,    A <- A + dA

    Arguments:
        ratio: of the two learning rates. It applies to every factor whose name starts with "b".

    Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.
    """

    def scaled(g: Update, p: Update) -> Update:
        factors = {name: f * ratio if name.startswith("b") else f for name, f in g.factors.items()}
        return dataclasses.replace(g, factors=factors)

    return _stateless(scaled)


def riemannian(damping: float = 1e-6) -> optax.GradientTransformation:
    """Scales the gradients of a LoRA by the other factor: `optax.chain(jlora.riemannian(), optax.sgd(1e-2))`.

        dA <- dA (B B^T + damping I)^-1,    dB <- (A^T A + damping I)^-1 dB

    A step then changes A B as much whatever the sizes of A and B. Other updates go through as they are.

    Arguments:
        damping: keeps the inverse finite, at the start above all, where one factor is zero.

    Zhang and Pilanci 2024, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv:2402.02347.
    """

    def scaled(g: Update, p: Update) -> Update:
        if not isinstance(p.method, LoRA):
            return g
        (a, b), factors = _matrices(p, p.factors | p.frozen), dict(g.factors)
        da, db = _matrices(g, g.factors | g.frozen)
        if "a" in factors:
            factors["a"] = _solve(b.mT, da.mT, damping).mT.reshape(p.factors["a"].shape)
        factors["b"] = _solve(a, db, damping).reshape(p.factors["b"].shape)
        return dataclasses.replace(g, factors=factors)

    return _stateless(scaled)


def lora_fa_gradient(damping: float = 1e-8) -> optax.GradientTransformation:
    """Makes the step of B the one that moves the weight nearest to the full gradient, where A is frozen (LoRA-FA).

        dB <- (A^T A + damping I)^-1 dB / s^2

    Updates whose A trains, or that are no LoRA, go through as they are.

    Arguments:
        damping: keeps the inverse finite.

    Zhang et al. 2023, LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning,
    arXiv:2308.03303.
    """

    def scaled(g: Update, p: Update) -> Update:
        if not isinstance(p.method, LoRA) or "a" in p.factors:
            return g
        a, _ = _matrices(p, p.factors | p.frozen)
        _, db = _matrices(g, g.factors | g.frozen)
        b = _solve(a, db, damping) / (p.method.scale * p.scale) ** 2
        return dataclasses.replace(g, factors={"b": b.reshape(p.factors["b"].shape)})

    return _stateless(scaled)


def _matrices(update: Update, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A and B as `(*stack, in, rank)` and `(*stack, rank, out)`, a group counted with the stack."""
    method: Any = update.method
    stack = [n for n, role in zip(update.shape, update.roles, strict=True) if role == "stack"]
    a, b = arrays["a"], arrays["b"]
    if method.groups > 1:
        a = jnp.moveaxis(a, -2, len(stack))
        stack = [*stack, a.shape[len(stack)]]
    return a.reshape(*stack, -1, method.rank), b.reshape(*stack, method.rank, -1)


def _solve(factor: jax.Array, right: jax.Array, damping: float) -> jax.Array:
    """(F^T F + damping I)^-1 right, with F: (*stack, n, rank) and right: (*stack, rank, k)."""
    wide = factor.astype(accumulation_dtype(factor.dtype))
    with jax.default_matmul_precision("highest"):
        gram = wide.mT @ wide
        solved = inverse(gram + damping * identity_like(gram)) @ right.astype(gram.dtype)
    return solved.astype(right.dtype)


def orthogonality(adapter: Any) -> jax.Array:
    """How far the AdaLoRA updates of a tree are from singular vectors, a term to be added to the loss.

        sum of |P^T P - I|^2 + |Q Q^T - I|^2,    Frobenius norms

    Zhang et al. 2023, AdaLoRA, arXiv:2303.10512 (its weight there is 0.1 to 0.5).
    """
    total = jnp.zeros(())
    for update in jax.tree.leaves(adapter, is_leaf=_is_update):
        if _is_update(update) and set(update.factors) == {"p", "e", "q"}:
            stack = update.factors["e"].shape[:-1]
            p = update.factors["p"].reshape(math.prod(stack), -1, update.method.rank)
            q = update.factors["q"].reshape(math.prod(stack), update.method.rank, -1)
            eye = jnp.eye(update.method.rank, dtype=p.dtype)[None]
            total = total + jnp.sum(jnp.square(p.mT @ p - eye)) + jnp.sum(jnp.square(q @ q.mT - eye))
    return total
