"""DyLoRA: a random rank in every training step, and adapters truncated to fewer ranks."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from jlora.methods._base import Adapter, Update
from jlora.methods._common.factor_axes import expand
from jlora.methods._lowering import as_single
from jlora.methods.grouped_lora import GroupedLoRA
from jlora.methods.lora import LoRA


def with_rank(adapter: Adapter, key: jax.Array) -> Adapter:
    """Keeps a random number of the leading ranks of every LoRA; call it inside the loss.

        W + s A[:, :b] B[:b],    b uniform in 1 ... rank

    One random share is drawn for all updates: each keeps that share of its ranks. After such training every truncation
    of the adapter (`jlora.truncate`) can be used.

    Arguments:
        adapter: the adapter.
        key: a PRNG key, new for every training step.

    Returns:
        the adapter with a rank mask, (rank,), in each LoRA.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if no update is a LoRA.

    Example:
        def loss(adapter, params, x, y, key):
            return jnp.mean((jlora.adapt(apply)(params, jlora.with_rank(adapter, key), x) - y) ** 2)

    Valipour et al. 2022, DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation,
    arXiv:2210.07558.
    """
    _check_has_lora(adapter)
    share = jax.random.uniform(key, minval=0, maxval=1)

    def masked(update: Update) -> Update:
        if not isinstance(update.method, (LoRA, GroupedLoRA)):
            return update
        rank = update.method.rank
        mask = jnp.arange(1.0, rank + 1) <= jnp.ceil(share * rank).clip(1)
        return dataclasses.replace(update, rank_mask=mask.astype(jnp.float32))

    return {path: masked(update) for path, update in adapter.items()}


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Truncates every LoRA to its leading ranks, at the same scale.

        W + s A[:, :rank] B[:rank]

    Arguments:
        adapter: the adapter.
        rank: how many ranks to keep; an update with fewer ranks is not changed.

    Returns:
        the adapter with smaller factors.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if no update is a LoRA, or `rank` is not a positive integer.

    Valipour et al. 2022, DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation,
    arXiv:2210.07558.
    """
    _check_has_lora(adapter)
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(f"rank must be a positive integer, not {rank!r}.")
    return {path: _truncate(update, int(rank)) for path, update in adapter.items()}


def _truncate(update: Update, rank: int) -> Update:
    method = update.method
    if not isinstance(method, (LoRA, GroupedLoRA)) or method.rank <= rank:
        return update
    alpha = None if method.alpha is None else method.scale * (rank**0.5 if method.rank_stabilized else rank)

    def leading(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        axes = {name: expand(update.declared[name], update.axes).index("rank") for name in arrays}
        return {name: jax.lax.slice_in_dim(array, 0, rank, axis=axes[name]) for name, array in arrays.items()}

    return dataclasses.replace(
        update,
        method=dataclasses.replace(method, rank=rank, alpha=alpha),
        factors=leading(update.factors),
        frozen=leading(update.frozen),
        initial=leading(update.initial),
        rank_mask=None,
    )


def _check_has_lora(adapter: Adapter) -> None:
    if not any(isinstance(update.method, (LoRA, GroupedLoRA)) for update in as_single(adapter).values()):
        methods = ", ".join(sorted({type(update.method).__name__ for update in adapter.values()})) or "no updates"
        raise ValueError(
            f"Only LoRA and GroupedLoRA updates can be truncated to fewer ranks; this adapter has {methods}. "
            "jlora.to_lora turns other updates into LoRA."
        )
