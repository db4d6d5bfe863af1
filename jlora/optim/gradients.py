"""Gradient transformations for optax that treat A and B differently."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from jlora._ir.materialize import accumulation_dtype
from jlora.methods._base import Update
from jlora.methods._common.factor_axes import as_pair, from_pair
from jlora.methods._common.linalg import identity_like, inverse
from jlora.methods.grouped_lora import GroupedLoRA
from jlora.methods.lora import LoRA
from jlora.optim.labels import check_holds_updates


def _is_update(node: Any) -> bool:
    return isinstance(node, Update)


def _stateless(fn: Callable[[Update, Update], Update]) -> optax.GradientTransformation:
    """The transformation that applies `fn(gradients, parameters)` to every `Update` in the tree."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("This transformation needs the factors: call update(gradients, state, params).")
        check_holds_updates(params)
        new = jax.tree.map(lambda g, p: fn(g, p) if _is_update(p) else g, updates, params, is_leaf=_is_update)
        return new, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Gives B a higher learning rate than A (LoRA+); it comes last in a chain.

        B <- B + ratio dB,    A <- A + dA

    Arguments:
        ratio: the learning rate of B divided by that of A. It applies to every factor with the weight's out axes, an
            axis of its own such as the rank, and no in axes.

    Returns:
        the transformation, without state.

    Raises:
        ValueError: from `update`, if it is called without parameters, or with a state of Flax NNX.

    Example:
        tx = optax.chain(optax.adamw(1e-4), jlora.lora_plus(16))

    Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv:2402.12354.
    """

    def scaled(g: Update, p: Update) -> Update:
        names = _output_factors(p)
        return dataclasses.replace(g, factors={n: f * ratio if n in names else f for n, f in g.factors.items()})

    return _stateless(scaled)


def _output_factors(update: Update) -> set[str]:
    """The names of the factors with out axes, axes of their own, and no in axes, like B."""
    if _is_lora(update):
        return {"b"}
    declared = {name: set(text.split()) for name, text in update.declared.items()}
    outputs = {name for name, axes in declared.items() if "*out" in axes and "*in" not in axes}
    return {name for name in outputs if declared[name] - {"*stack", "*layers", "*out"}}


def riemannian(damping: float = 1e-6) -> optax.GradientTransformation:
    """Preconditions the gradient of each factor of a LoRA by the other factor; it comes first in a chain.

        dA <- dA (B B^T + damping I)^-1,    dB <- (A^T A + damping I)^-1 dB

    The change of A B by a step then does not depend on how A and B are scaled against each other. The gradients of
    other methods are not changed.

    Arguments:
        damping: keeps the inverse finite, above all at initialisation, when one factor is zero.

    Returns:
        the transformation, without state.

    Raises:
        ValueError: from `update`, if it is called without parameters, or with a state of Flax NNX.

    Example:
        tx = optax.chain(jlora.riemannian(), optax.sgd(1e-2))

    Zhang and Pilanci 2024, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv:2402.02347.
    """

    def scaled(g: Update, p: Update) -> Update:
        if not _is_lora(p):
            return g
        (a, b), factors = _as_pair(p, p.factors | p.frozen), dict(g.factors)
        da, db = _as_pair(g, g.factors | g.frozen)
        if "a" in factors:
            factors["a"] = _as_factor(p, _solve(b.mT, da.mT, damping).mT, "a")
        factors["b"] = _as_factor(p, _solve(a, db, damping), "b")
        return dataclasses.replace(g, factors=factors)

    return _stateless(scaled)


def lora_fa_gradient(damping: float = 1e-8) -> optax.GradientTransformation:
    """Corrects the gradient of B so that the step of the weight is closest to full training, for a frozen A (LoRA-FA).

        dB <- (A^T A + damping I)^-1 dB / s^2

    The gradients of updates whose A is trained, and of other methods, are not changed. It comes first in a chain.

    Arguments:
        damping: keeps the inverse finite.

    Returns:
        the transformation, without state.

    Raises:
        ValueError: from `update`, if it is called without parameters, or with a state of Flax NNX.

    Example:
        tx = optax.chain(jlora.lora_fa_gradient(), optax.adamw(1e-4))

    Zhang et al. 2023, LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning,
    arXiv:2308.03303.
    """

    def scaled(g: Update, p: Update) -> Update:
        if not _is_lora(p) or "a" in p.factors:
            return g
        a, _ = _as_pair(p, p.factors | p.frozen)
        _, db = _as_pair(g, g.factors | g.frozen)
        b = _solve(a, db, damping) / (p.method.scale * p.scale) ** 2
        return dataclasses.replace(g, factors={"b": _as_factor(p, b, "b")})

    return _stateless(scaled)


def _is_lora(update: Update) -> bool:
    return isinstance(update.method, (LoRA, GroupedLoRA))


def _as_pair(update: Update, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A and B as `(*stack, in, rank)` and `(*stack, rank, out)`, groups as part of the stack."""
    return as_pair(arrays["a"], arrays["b"], (update.declared["a"], update.declared["b"]), update.axes)


def _as_factor(update: Update, matrix: jax.Array, name: str) -> jax.Array:
    """A matrix as in `_as_pair`, in the shape of the factor."""
    pair = (update.declared["a"], update.declared["b"])
    return from_pair(matrix, update[name], pair, update.axes, "ab".index(name))


def _solve(factor: jax.Array, right: jax.Array, damping: float) -> jax.Array:
    """(F^T F + damping I)^-1 right, with F: (*stack, n, rank) and right: (*stack, rank, k)."""
    factor = factor.astype(accumulation_dtype(factor.dtype))
    with jax.default_matmul_precision("highest"):
        gram = factor.mT @ factor
        solved = inverse(gram + damping * identity_like(gram)) @ right.astype(gram.dtype)
    return solved.astype(right.dtype)
