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
        inner: the state of the wrapped optimiser.
        step: the number of steps so far, an int32 scalar.
        sensitivity: the running mean of |factor * gradient|, for every factor.
        uncertainty: the running mean of the absolute deviation of |factor * gradient| from `sensitivity`.
        keep: which ranks are kept, a boolean array (*stack, rank) for every update.
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
    """Wraps an optimiser: it prunes the ranks of AdaLoRA updates down to a given mean rank.

        score of rank k = s(e_k) + mean_i s(P_ik) + mean_j s(Q_kj),    s = mean |w dw| * mean deviation of |w dw|

    After `warmup` steps the number of kept ranks falls from all to the target along a cubic. Every `interval` steps
    e is set to zero for the ranks with the lowest scores. In the last `final` steps the kept ranks do not change.

    Arguments:
        inner: the optimiser of all factors.
        target_rank: the mean rank of the adapted matrices at the end; each layer of a stacked weight is one matrix.
        total_steps: the number of training steps.
        warmup, final: the number of steps before the first pruning, and after the last.
        interval: the number of steps between two prunings.
        beta1, beta2: the decay of the running means of the sensitivity and of its deviation.

    Returns:
        the transformation. Its parameters are an adapter, or any tree that contains adapters.

    Raises:
        ValueError: if the schedule does not fit into `total_steps`; from `init`, if the parameters have no AdaLoRA
            update; from `update`, if it is called without parameters.

    Example:
        tx = jlora.rank_budget(optax.adamw(1e-3), target_rank=4, total_steps=1000, warmup=100, final=200)
        state = tx.init(adapter)

    Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512.
    """
    if not 0 <= warmup + final < total_steps or interval < 1:
        raise ValueError(
            f"warmup {warmup} and final {final} leave no step of {total_steps} for pruning, or interval {interval} is "
            "not positive. Lower warmup or final, or raise total_steps or interval."
        )

    def init(params: Any) -> BudgetState:
        adalora_updates = _updates(params)
        if not adalora_updates:
            raise ValueError(
                "rank_budget prunes the ranks of AdaLoRA updates, and the parameters have none. Initialise the adapter "
                "with jlora.AdaLoRA."
            )
        zeros = [jax.tree.map(jnp.zeros_like, update.factors) for update in adalora_updates]
        keep = [jnp.ones(update.factors["e"].shape, bool) for update in adalora_updates]
        return BudgetState(inner.init(params), jnp.zeros((), jnp.int32), zeros, zeros, keep)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("rank_budget needs the factors: call update(gradients, state, params).")
        steps, inner_state = inner.update(updates, state.inner, params)
        sensitivity, uncertainty = _averages(updates, params, state, beta1, beta2)
        scores = [_scores(*pair) for pair in zip(sensitivity, uncertainty, strict=True)]
        total_ranks = sum(score.size for score in scores)
        matrices = sum(score.size // score.shape[-1] for score in scores)
        remaining = 1 - (state.step - warmup) / (total_steps - warmup - final)
        target = target_rank * matrices
        budget = jnp.round(target + (total_ranks - target) * jnp.clip(remaining, 0, 1) ** 3).astype(jnp.int32)
        ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores]), descending=True)
        threshold = ordered[jnp.clip(budget - 1, 0, total_ranks - 1)]
        prune = (state.step % interval == 0) & (state.step >= warmup) & (state.step <= total_steps - final)
        keep = [jnp.where(prune, score >= threshold, old) for score, old in zip(scores, state.keep, strict=True)]
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
    """The new running means: of the sensitivity |w dw|, and of its deviation from that mean."""
    now = [
        jax.tree.map(lambda w, g: jnp.abs(w * g), p.factors, g.factors)
        for p, g in zip(_updates(params), _updates(gradients), strict=True)
    ]
    sensitivity = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, state.sensitivity, now)
    deviation = jax.tree.map(lambda new, mean: jnp.abs(new - mean), now, sensitivity)
    uncertainty = jax.tree.map(lambda old, new: beta2 * old + (1 - beta2) * new, state.uncertainty, deviation)
    return sensitivity, uncertainty


def _scores(sensitivity: dict[str, jax.Array], uncertainty: dict[str, jax.Array]) -> jax.Array:
    """The score of every rank of an update, (*stack, rank)."""
    s = {name: sensitivity[name] * uncertainty[name] for name in sensitivity}
    *stack, rank = s["e"].shape
    columns = s["p"].reshape(*stack, -1, rank).mean(-2)
    return s["e"] + columns + s["q"].reshape(*stack, rank, -1).mean(-1)


def _masked(step: Update, params: Update, keep: jax.Array) -> Update:
    """The step that sets e to zero for every rank that is not kept."""
    e = params.factors["e"]
    return dataclasses.replace(step, factors={**step.factors, "e": jnp.where(keep, step.factors["e"], -e)})


def orthogonality(adapter: Any) -> jax.Array:
    """How far P and Q of the AdaLoRA updates are from orthogonal matrices: a term for the loss.

        sum of |P^T P - I|^2 + |Q Q^T - I|^2,    Frobenius norms

    Arguments:
        adapter: an adapter, or any tree that contains adapters.

    Returns:
        a scalar, 0 without AdaLoRA updates. The paper multiplies it by 0.1 to 0.5.

    Example:
        loss = task_loss + 0.1 * jlora.orthogonality(adapter)

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
