"""Blocks of rows that share one gathered adapter: how many rows a block has, and which."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._trace.trace import trace
from jlora._tree.leaves import is_quantized
from jlora.bank.bank import Bank

FLOPS_PER_BYTE = 64  # what a machine computes while it moves one byte: about 10 on CPUs, 100 to 300 on accelerators


def cheapest_block(
    fun: Callable[..., Any],
    params: Any,
    bank: Bank,
    rows: int,
    args: tuple[Any, ...],
    axes: Sequence[int | None],
    kwargs: dict[str, Any],
) -> int:
    """The block size with the least cost, in FLOPs: computed rows, and gathered bytes times `FLOPS_PER_BYTE`."""
    if rows <= len(bank) + 1:
        return 1

    def one_row(leaf: Any, axis: int | None) -> Any:
        if axis is None:
            return leaf
        shape = list(np.shape(leaf))
        shape[axis] = 1
        return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))

    leaves = [one_row(leaf, axis) for leaf, axis in zip(jax.tree.leaves(args), axes, strict=True)]
    row = jax.tree.unflatten(jax.tree.structure(args), leaves)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params, is_leaf=is_quantized)
    sites = trace(fun, shapes, *row, **kwargs)
    flops = sum(site.flops for site in sites.values())
    moved = 2 * sum(a.nbytes for a in jax.tree.leaves(bank.adapter)) / len(bank)
    kinds = kinds_of_rows(bank)

    def cost(size: int) -> float:
        blocks = count_blocks(rows, size, kinds) if size > 1 else rows
        return blocks * (size * flops + moved * FLOPS_PER_BYTE)

    return min((1 << k for k in range(rows.bit_length())), key=cost)


def rows_of_blocks(ids: jax.Array, size: int, kinds: int) -> jax.Array:
    """The rows of every block, (blocks, size): rows of one id each, a block that is not full repeats its first row.

    Blocks that are not needed repeat the first row of the batch.
    """
    rows = ids.shape[0]
    order = jnp.argsort(ids).astype(jnp.int32)
    ordered = ids[order]
    is_new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    start = jax.lax.cummax(jnp.where(is_new, jnp.arange(rows), 0))
    within = jnp.arange(rows) - start
    block = jnp.cumsum(within % size == 0) - 1
    first = jnp.zeros(count_blocks(rows, size, kinds), jnp.int32).at[block].max(jnp.where(within % size == 0, order, 0))
    return jnp.broadcast_to(first[:, None], (first.size, size)).at[block, within % size].set(order)


def kinds_of_rows(bank: Bank) -> int:
    """How many kinds of rows a batch can have: one for each member, for the base, and for unknown ids under `jit`."""
    return len(bank) + 2


def count_blocks(rows: int, size: int, kinds: int) -> int:
    """How many blocks any ids need: a block that is not full for every kind of row, at most.

    Arguments:
        rows: of the batch.
        size: rows of a block.
        kinds: how many kinds of rows there can be, `kinds_of_rows`.
    """
    kinds = min(kinds, rows)
    return (rows - kinds) // size + kinds
