"""AdaLoRA: the rank pruning schedule, and the orthogonality term of the loss."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.methods._base import Update
from jlora.methods._common.factor_axes import as_pair
from jlora.methods.adalora import AdaLoRA


class BudgetState(NamedTuple):
    """The state of `rank_budget`.

    Arguments:
        inner: of the optimiser inside.
        step: how many there were.
        sensitivity: the running mean of |factor * gradient|, for every factor.
        uncertainty: the running mean of how far that strays from its mean.
        keep: for every update, which of its ranks are left.
    """

    inner: Any
    step: jax.Array
    sensitivity: Any
    uncertainty: Any
    keep: Any


def rank_budget(
    inner: optax.GradientTransformation,
    *,
    target_rank: float,
    total_steps: int,
    warmup: int = 0,
    final: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformation:
    """Wraps an optimiser so that AdaLoRA updates end with a given rank on average, more of it where it matters.

        score of rank k = s(e_k) + mean_i s(P_ik) + mean_j s(Q_kj),    s = mean |w dw| * mean deviation of it

    After `warmup` steps the number of ranks kept falls from all to the target along a cubic; every `interval` steps
    those with the lowest scores have their e set to zero. For the last `final` steps the choice stands.

    Arguments:
        inner: the optimiser of all factors.
        target_rank: the mean rank of the adapted matrices (a stacked weight has as many as layers) at the end.
        total_steps: of the training.
        warmup, final: how many steps pass before the first rank goes, and after the last.
        interval: steps between choices.
        beta1, beta2: decay of the two running means.

    Raises:
        ValueError: where the schedule does not fit into `total_steps`, or there is no AdaLoRA among the parameters.

    Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512.
    """
    if not 0 <= warmup + final < total_steps or interval < 1:
        raise ValueError(f"warmup {warmup} and final {final} leave no step of {total_steps} for the budget to fall.")

    def init(params: Any) -> BudgetState:
        found = _updates(params)
        if not found:
            raise ValueError("rank_budget shares out the ranks of AdaLoRA updates, and there are none.")
        zeros = [jax.tree.map(jnp.zeros_like, u.factors) for u in found]
        keep = [jnp.ones(u.factors["e"].shape, bool) for u in found]
        return BudgetState(inner.init(params), jnp.zeros((), jnp.int32), zeros, zeros, keep)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("rank_budget looks at the factors: call update(gradients, state, params).")
        steps, inner_state = inner.update(updates, state.inner, params)
        sensitivity, uncertainty = _averages(updates, params, state, beta1, beta2)
        scores = [_scores(*pair) for pair in zip(sensitivity, uncertainty, strict=True)]
        everything = sum(score.size for score in scores)
        matrices = sum(score.size // score.shape[-1] for score in scores)
        left = 1 - (state.step - warmup) / (total_steps - warmup - final)
        goal = target_rank * matrices
        budget = jnp.round(goal + (everything - goal) * jnp.clip(left, 0, 1) ** 3).astype(jnp.int32)
        ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores]), descending=True)
        least = ordered[jnp.clip(budget - 1, 0, everything - 1)]
        choose = (state.step % interval == 0) & (state.step >= warmup) & (state.step <= total_steps - final)
        keep = [jnp.where(choose, score >= least, old) for score, old in zip(scores, state.keep, strict=True)]
        masks = iter(keep)
        steps = jax.tree.map(
            lambda step, p: _masked(step, p, next(masks)) if _is_adalora(p) else step,
            steps,
            params,
            is_leaf=lambda node: isinstance(node, Update),
        )
        return steps, BudgetState(inner_state, state.step + 1, sensitivity, uncertainty, keep)

    return optax.GradientTransformation(init, update)


def _is_adalora(node: Any) -> bool:
    return isinstance(node, Update) and isinstance(node.method, AdaLoRA)


def _updates(tree: Any) -> list[Update]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Update))
    return [leaf for leaf in leaves if _is_adalora(leaf)]


def _averages(gradients: Any, params: Any, state: BudgetState, beta1: float, beta2: float) -> tuple[Any, Any]:
    now = [
        jax.tree.map(lambda w, g: jnp.abs(w * g), p.factors, g.factors)
        for p, g in zip(_updates(params), _updates(gradients), strict=True)
    ]
    sensitivity = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, state.sensitivity, now)
    deviation = jax.tree.map(lambda new, mean: jnp.abs(new - mean), now, sensitivity)
    uncertainty = jax.tree.map(lambda old, new: beta2 * old + (1 - beta2) * new, state.uncertainty, deviation)
    return sensitivity, uncertainty


def _scores(sensitivity: dict[str, jax.Array], uncertainty: dict[str, jax.Array]) -> jax.Array:
    s = {name: sensitivity[name] * uncertainty[name] for name in sensitivity}
    *stack, rank = s["e"].shape
    columns = s["p"].reshape(*stack, -1, rank).mean(-2)
    return s["e"] + columns + s["q"].reshape(*stack, rank, -1).mean(-1)


def _masked(step: Update, params: Update, keep: jax.Array) -> Update:
    """The step that sets e to zero where a rank is not kept."""
    e = params.factors["e"]
    return dataclasses.replace(step, factors={**step.factors, "e": jnp.where(keep, step.factors["e"], -e)})


def orthogonality(adapter: Any) -> jax.Array:
    """How far the AdaLoRA updates of a tree are from singular vectors, a term to be added to the loss.

        sum of |P^T P - I|^2 + |Q Q^T - I|^2,    Frobenius norms

    Arguments:
        adapter: an adapter, or any tree that contains adapters.

    Returns:
        a scalar; its weight in the paper is 0.1 to 0.5.

    Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512.
    """
    total = jnp.zeros(())
    for update in _updates(adapter):
        declared = update.declared["p"], update.declared["q"]
        p, q = as_pair(update.factors["p"], update.factors["q"], declared, update.axes)
        identity = jnp.eye(p.shape[-1], dtype=p.dtype)
        identity = jnp.expand_dims(identity, list(range(p.ndim - 2)))
        total = total + jnp.sum(jnp.square(p.mT @ p - identity)) + jnp.sum(jnp.square(q @ q.mT - identity))
    return total
