"""Ranks that change: one drawn for every training step, and an adapter cut down to fewer (DyLoRA)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single
from jlora.methods.lora import LoRA


def with_rank(adapter: Adapter, key: jax.Array) -> Adapter:
    """Leaves every LoRA a random number of its leading ranks; call it inside the loss.

        W + s A[:, :b] B[:b],    b uniform in 1 ... rank

    One number is drawn for all: updates of other ranks keep the same share of theirs. Trained so, each truncation of
    the adapter (`jlora.truncate`) is one that can be used.

    Arguments:
        adapter: the adapter.
        key: a PRNG key, new for every training step.

    Raises:
        ValueError: where no update is a LoRA.

    Valipour et al. 2022, DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation,
    arXiv:2210.07558.
    """
    _some_lora(adapter)
    share = jax.random.uniform(key, minval=0, maxval=1)

    def kept(update: Update) -> Update:
        if not isinstance(update.method, LoRA):
            return update
        rank = update.method.rank
        ranks = jnp.arange(1.0, rank + 1) <= jnp.ceil(share * rank).clip(1)
        return dataclasses.replace(update, frozen={**update.frozen, "kept": ranks.astype(jnp.float32)})

    return {path: kept(update) for path, update in adapter.items()}


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """Cuts every LoRA down to its leading ranks, at the same scale.

        W + s A[:, :rank] B[:rank]

    Arguments:
        adapter: the adapter.
        rank: how many to keep; an update of fewer stays as it is.

    Raises:
        ValueError: where no update is a LoRA, or the rank is none.
    """
    _some_lora(adapter)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"A rank is a whole number from 1 on, not {rank!r}.")
    return {path: _cut(update, rank) for path, update in adapter.items()}


def _cut(update: Update, rank: int) -> Update:
    method = update.method
    if not isinstance(method, LoRA) or method.rank <= rank:
        return update
    alpha = None if method.alpha is None else method.scale * (rank**0.5 if method.rank_stabilized else rank)
    before = update.roles.count("stack") + (method.groups > 1)  # axes of B ahead of its rank

    def cut(name: str, array: Any) -> Any:
        return array[..., :rank] if name.startswith("a") else array[(slice(None),) * before + (slice(rank),)]

    return dataclasses.replace(
        update,
        method=dataclasses.replace(method, rank=rank, alpha=alpha),
        factors={name: cut(name, array) for name, array in update.factors.items()},
        frozen={name: cut(name, array) for name, array in update.frozen.items() if name != "kept"},
    )


def _some_lora(adapter: Adapter) -> None:
    if not any(isinstance(update.method, LoRA) for update in as_single(adapter).values()):
        kinds = ", ".join(sorted({type(update.method).__name__ for update in adapter.values()})) or "nothing"
        raise ValueError(f"Ranks can be left out of LoRA updates, and the adapter has none: it holds {kinds}.")
