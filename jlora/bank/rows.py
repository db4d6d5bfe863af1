"""One batch, many adapters: every row of a batch uses the adapter that its id names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat
from jlora._adapter.adapt import adapt
from jlora.bank.bank import Bank, check_bank
from jlora.bank.blocks import cheapest_block, kinds_of_rows, rows_of_blocks
from jlora.methods._base import Adapter, Update
from jlora.methods._common.factor_axes import expand
from jlora.methods.lora import LoRA


def apply(
    fun: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0, *, block: int | None = None, **options: Any
) -> Callable[..., Any]:
    """Turns a function of base parameters and a batch into one whose rows use different adapters of a bank.

        g(params, bank, ids, x)[i] == adapt(f)(params, bank[names[ids[i]]], x[i:i+1])[0],    -1 for the base

    The base product is computed once for all rows. Every row's factors are gathered by its id; those of a LoRA of
    stacked layers are gathered inside the loop over layers, one layer at a time. If rows are many and adapters few,
    rows are sorted by id and divided into blocks of one adapter each, so that factors are gathered for each block:
    `rows / block + members` blocks, at most. The cheaper of the two is chosen by counted cost: the FLOPs of blocks that
    are not full against the bytes of gathered factors.

    The rows must be independent of each other, as they are in a forward pass in inference mode.

    Arguments:
        fun: `fun(params, *args)`, as for `jlora.adapt`. It gets batches of `block` rows.
        in_axes: the axis of rows in each of `args`, an integer or None or a tree of them, as for `jax.vmap`.
        out_axes: the axis of rows in the results.
        block: how many rows share one gathered adapter; 1 gathers for every row, None chooses.
        options: those of `jlora.adapt`.

    Returns:
        `g(params, bank, ids, *args, **kwargs)`, where `ids` is (rows,), integers, -1 for the base; `bank.ids(names)`
        makes them. All rows share the keywords.

    Raises:
        TypeError: from `g`, if `bank` is not a bank, or `ids` are names.
        ValueError: from `g`, if `ids` does not fit the rows, or holds an unknown id. Under `jit` the rows
            of such an id are NaN.

    Example:
        apply = jax.jit(jlora.bank.apply(model.apply))
        logits = apply(params, bank, bank.ids(["films", None, "tweets"]), tokens)

    Sheng et al. 2023, S-LoRA: Serving Thousands of Concurrent LoRA Adapters, arXiv:2311.03285.
    """
    adapted = adapt(fun, **options)

    def applied(params: Any, bank: Bank, ids: Any, *args: Any, **kwargs: Any) -> Any:
        check_bank(bank)
        axes = axes_of_leaves(in_axes, args)
        rows = count_rows(args, axes)
        ids = _checked_ids(ids, rows, len(bank))
        size = (block or cheapest_block(fun, params, bank, rows, args, axes, kwargs)) if rows else 1
        if rows and not 1 <= size <= rows:
            raise ValueError(f"A block has 1 to {rows} rows, as many as the batch, not {size}.")

        def of_block(member: Adapter, *leaves: Any) -> Any:
            return adapted(params, member, *jax.tree.unflatten(jax.tree.structure(args), leaves), **kwargs)

        leaves = jax.tree.leaves(args)
        if size == 1:
            return map_rows(of_block, *_gather(bank.adapter, ids, in_loops=True), leaves, axes, out_axes)
        places = rows_of_blocks(ids, size, kinds_of_rows(bank))
        members, member_axes = _gather(bank.adapter, ids[places[:, 0]], in_loops=True)
        taken = [_take_rows(leaf, places, axis) for leaf, axis in zip(leaves, axes, strict=True)]
        mapped = jax.vmap(of_block, (member_axes, *(None if axis is None else 0 for axis in axes)))
        return _restore_rows(mapped(members, *taken), places, rows, out_axes)

    return applied


def select(bank: Bank, ids: Any) -> tuple[Adapter, Any]:
    """The adapter of every row of a batch, for a program that maps rows by `jax.vmap` itself.

    Arguments:
        bank: the bank.
        ids: (rows,), integers, -1 for the base, as for `apply`.

    Returns:
        an adapter whose arrays have an axis of rows, and a tree of these axes, for `in_axes`. It is the second axis of
        a factor of stacked layers, which a scan takes along the first.

    Raises:
        ValueError: if `ids` are not integers, or hold an unknown id. Under `jit` the rows of such an id
            are NaN.

    Example:
        members, axes = jlora.bank.select(bank, ids)
        logits, cache = jax.vmap(jlora.adapt(step), (None, axes, 0, 1), (0, 1))(params, members, tokens, cache)
    """
    return _gather(bank.adapter, _checked_ids(ids, np.shape(ids)[0], len(bank)))


def axes_of_leaves(in_axes: Any, args: tuple[Any, ...]) -> list[int | None]:
    """The axis of rows of every leaf of the arguments."""
    per_argument = tuple(in_axes) if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
    if len(per_argument) != len(args):
        raise ValueError(f"in_axes has {len(per_argument)} entries for {len(args)} arguments after the ids.")
    return [axis for spec, arg in zip(per_argument, args, strict=True) for axis in _broadcast(spec, arg)]


def _broadcast(spec: Any, tree: Any) -> list[int | None]:
    """A prefix of a tree with one entry for every leaf."""
    is_none = lambda node: node is None  # noqa: E731
    nested = jax.tree.map(lambda axis, part: [axis] * len(jax.tree.leaves(part)), spec, tree, is_leaf=is_none)
    return [axis for part in jax.tree.leaves(nested, is_leaf=lambda node: isinstance(node, list)) for axis in part]


def count_rows(args: tuple[Any, ...], axes: Sequence[int | None]) -> int:
    """The number of rows of the arguments, given the axis of rows of every leaf."""
    sizes = {np.shape(leaf)[axis] for leaf, axis in zip(jax.tree.leaves(args), axes, strict=True) if axis is not None}
    if len(sizes) != 1:
        raise ValueError(f"The arguments have {sorted(sizes) or 'no'} rows along in_axes; one number is expected.")
    return sizes.pop()


def _checked_ids(ids: Any, rows: int, members: int) -> jax.Array:
    if isinstance(ids, (list, tuple)) and any(isinstance(i, str | None) for i in ids):
        raise TypeError("ids are integers: jlora.bank.apply(f)(params, bank, bank.ids(names), *args).")
    if np.shape(ids) != (rows,) or not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(
            f"ids has shape {np.shape(ids)} and dtype {jnp.result_type(ids)}; expected ({rows},) integers, one for "
            "every row of the batch. bank.ids(names) makes them."
        )
    if not _compat.is_tracer(ids):
        wrong = sorted({int(i) for i in np.asarray(ids) if not -1 <= i < members})
        if wrong:
            raise ValueError(f"The bank has the ids 0 to {members - 1}, and -1 for the base, not {wrong}.")
    ids = jnp.asarray(ids, jnp.int32)
    return jnp.where((ids < -1) | (ids >= members), members, ids)


def map_rows(
    of_block: Callable[..., Any],
    members: Any,
    member_axes: Any,
    leaves: Sequence[Any],
    axes: Sequence[int | None],
    out_axes: Any,
) -> Any:
    """Blocks of one row: the axis of rows is mapped where it is, so that no argument or result is copied.

    Arguments:
        of_block: `of_block(member, *leaves)`, of a batch of one row.
        members: the first argument of all rows, and `member_axes` the axis of rows in each of its arrays.
        leaves: the leaves of the other arguments, and `axes` the axis of rows in each.
        out_axes: the axis of rows in the results.
    """
    rows = [leaf if axis is None else _with_axis_of_one(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)]
    places = [None if axis is None else axis % np.ndim(leaf) for leaf, axis in zip(leaves, axes, strict=True)]

    def of_row(member: Any, *row: Any) -> Any:
        out = of_block(member, *row)
        for leaf, axis in zip(jax.tree.leaves(out), _broadcast(out_axes, out), strict=True):
            _check_rows(leaf.shape, axis, 1)
        return out

    before = jax.tree.map(lambda axis: axis - 1 if axis < 0 else axis, out_axes)  # the axis of one comes after rows
    out, structure = jax.tree.flatten(jax.vmap(of_row, (member_axes, *places), before)(members, *rows))
    out_places = _broadcast(before, jax.tree.unflatten(structure, out))
    merged = [_without_axis_of_one(leaf, axis or 0) for leaf, axis in zip(out, out_places, strict=True)]
    return jax.tree.unflatten(structure, merged)


def _with_axis_of_one(leaf: Any, axis: int) -> jax.Array:
    """The same array with an axis of size one after the axis of rows, without a copy."""
    leaf = jnp.asarray(leaf)
    axis %= leaf.ndim
    return _compat.row_major(leaf.reshape(*leaf.shape[: axis + 1], 1, *leaf.shape[axis + 1 :]))


def _without_axis_of_one(leaf: jax.Array, axis: int) -> jax.Array:
    axis %= leaf.ndim
    return leaf.reshape(*leaf.shape[: axis + 1], *leaf.shape[axis + 2 :])


def _gather(stacked: Adapter, ids: jax.Array, *, in_loops: bool = False) -> tuple[Adapter, Any]:
    """The members of some ids, and the axis of each of their arrays that runs along ids.

    -1 has scale 0, and an unknown id has scale NaN. In a factor of a stack of layers the ids are the second
    axis: a scan takes its first axis, and a copy with the axes in another order would be as large as all factors.
    With `in_loops`, a low-rank update of stacked layers keeps the factors of all members, without an axis of ids: the
    loop over layers gathers those of one layer.
    """

    members = next(iter(jax.tree.leaves(stacked))).shape[0]
    places = jnp.clip(ids, 0, members - 1)

    def gather(array: jax.Array, axis: int | None) -> jax.Array:
        if axis is None:
            return array
        if axis == 0:
            return array.at[places].get(mode="promise_in_bounds")
        layers = jnp.arange(array.shape[1])[:, None]
        return array.at[places[None, :], layers].get(mode="promise_in_bounds")

    if in_loops:
        stacked = {path: _with_members(update, members) for path, update in stacked.items()}
    axes = {path: _id_axes(update) for path, update in stacked.items()}
    gathered = jax.tree.map(gather, stacked, axes)
    # No row of a known id holds NaN on the way, which `jax.debug_nans` would report.
    absent = jnp.where((ids == -1) | (ids == places), 0.0, jnp.nan)
    members = {
        path: dataclasses.replace(update, traced_scale=jnp.where(ids == places, update.traced_scale, absent))
        for path, update in gathered.items()
    }
    return members, axes


def _with_members(update: Update, members: int) -> Update:
    """The update with the position of each member, if a loop over layers can gather its factors."""
    is_declared = isinstance(update.method, LoRA) and update.rank_mask is not None and not update.initial
    is_stacked = bool(update.axes.axes("*stack"))
    return dataclasses.replace(update, member=jnp.arange(members)) if is_declared and is_stacked else update


def _id_axes(update: Update) -> Update:
    declared = {name: expand(text, update.axes) for name, text in update.declared.items()}
    stack = update.axes.axes("*stack")  # empty for a weight that no product uses, such as a bias

    def axes(arrays: dict[str, Any]) -> dict[str, int | None]:
        if update.member is not None:
            return dict.fromkeys(arrays)
        return {name: int(any(entry in stack for entry in declared.get(name, ())[:1])) for name in arrays}

    groups = {group: axes(getattr(update, group)) for group in ("factors", "frozen", "initial")}
    return dataclasses.replace(jax.tree.map(lambda _: 0, update), **groups)


def _take_rows(leaf: Any, places: jax.Array, axis: int | None) -> Any:
    """The rows of every block, with the blocks as the leading axis."""
    if axis is None:
        return leaf
    leaf = jnp.asarray(leaf)
    place = axis % leaf.ndim
    return jnp.moveaxis(jnp.take(leaf, places, axis=place), place, 0)


def _check_rows(shape: tuple[int, ...], axis: int | None, size: int) -> int:
    """The axis of rows of a result, counted from the front, after a check that it has one row for each of a block."""
    if axis is None:
        raise ValueError("out_axes has no None: every result has rows.")
    if not -len(shape) <= axis < len(shape) or shape[axis] != size:
        raise ValueError(
            f"A result has shape {shape} for a batch of {size} rows, and no rows along its axis {axis}. Pass out_axes "
            "with the axis of rows, and return results for every row."
        )
    return axis % len(shape)


def _restore_rows(out: Any, places: jax.Array, rows: int, out_axes: Any) -> Any:
    """The results in the order of the batch."""
    blocks, size = places.shape
    flat = places.reshape(-1)
    source = jnp.zeros(rows, jnp.int32).at[flat[::-1]].set(jnp.arange(blocks * size, dtype=jnp.int32)[::-1])

    def restore(leaf: jax.Array, axis: int | None) -> jax.Array:
        axis = _check_rows(leaf.shape[1:], axis, size)
        merged = jnp.moveaxis(leaf, 0, axis).reshape(*leaf.shape[1 : axis + 1], blocks * size, *leaf.shape[axis + 2 :])
        return jnp.take(merged, source, axis=axis)

    leaves, structure = jax.tree.flatten(out)
    return jax.tree.unflatten(
        structure, [restore(*pair) for pair in zip(leaves, _broadcast(out_axes, out), strict=True)]
    )
