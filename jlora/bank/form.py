"""The common form of several updates of one weight, so that their arrays can be stacked."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._adapter.to_lora import to_lora
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import expand
from jlora.methods._lowering import with_static_scale
from jlora.methods.dora import DoRA
from jlora.methods.grouped_lora import GroupedLoRA
from jlora.methods.lora import LoRA

# Zero ranks change nothing in these methods, so that members may differ in rank, alpha and rank_stabilized.
Padded = LoRA | GroupedLoRA | DoRA


def common_form(
    path: str, updates: Mapping[str, Update], *, params: Any = None, dropout: float | None = None, rank: int = 0
) -> dict[str, Update]:
    """The updates of one weight with one method and equal shapes of their arrays.

    If the methods differ in rank and scale alone, ranks are padded with zeros. If they differ otherwise, every update
    becomes its exact equal LoRA first.

    Arguments:
        path: of the weight.
        updates: the updates that members have for it, by the member's name.
        params: the base parameters; None unless a method depends on them.
        dropout: the dropout rate of all; None keeps their own, which must be equal.
        rank: the lowest rank of the result, of methods whose rank can be padded.

    Raises:
        ValueError: if the weights or dropout rates differ, or a method has no equal LoRA.
    """
    _check_equal(path, updates, "shape", "shapes")
    _check_equal(path, updates, "roles", "roles of axes")
    updates = {name: _without_step_state(path, name, update) for name, update in updates.items()}
    updates = _with_dropout_rate(path, updates, dropout)
    first, *others = (update.method for update in updates.values())
    if not all(is_equal_up_to_rank(first, other) for other in others):
        updates = {name: exact_lora(path, name, update, params) for name, update in updates.items()}
    ranks = [update.method.rank for update in updates.values() if isinstance(update.method, Padded)]
    return {name: pad_rank(update, max(rank, *ranks)) if ranks else update for name, update in updates.items()}


def member_form(path: str, name: str, update: Update | None, slot: Update, params: Any = None) -> Update:
    """An update in the form of a bank's slot.

    Arguments:
        path: of the weight.
        name: of the member, for errors.
        update: the update; None if the member does not adapt the weight.
        slot: an update of the bank's form for one member, of which methods and shapes are used.
        params: the base parameters; None unless a method depends on them.

    Raises:
        ValueError: if the update is for another weight, has a higher rank, or another method and no equal LoRA.
    """
    if update is None:
        return absent(slot)
    for field, noun in (("shape", "shapes"), ("roles", "roles of axes")):
        _check_equal(path, {name: update, "the bank": slot}, field, noun)
    update = _replace_dropout(_without_step_state(path, name, update), slot.method.dropout)
    if not is_equal_up_to_rank(update.method, slot.method) and isinstance(slot.method, LoRA):
        update = exact_lora(path, name, update, params)
    if not is_equal_up_to_rank(update.method, slot.method):
        raise ValueError(
            f"{name}: {path} has the method {update.method!r}, and the bank {slot.method!r}. Stack a bank of both."
        )
    if isinstance(update.method, Padded) and isinstance(slot.method, Padded):
        if update.method.rank > slot.method.rank:
            raise ValueError(
                f"{name}: {path} has rank {update.method.rank}, above the bank's {slot.method.rank}. Stack the bank "
                f"with rank={update.method.rank}."
            )
        update = pad_rank(update, slot.method.rank)
    update = with_array_scale(update)
    return jax.tree.map(lambda like, array: jnp.asarray(array, like.dtype), slot, update)


def pad_rank(update: Update, rank: int) -> Update:
    """An update that adds the same, with zeros for the ranks that it lacks.

    Its rank mask holds the scale of the method, alpha / rank, for the ranks that it has, and zero for the others.

    Arguments:
        update: a LoRA, GroupedLoRA or DoRA.
        rank: the new rank, not below the update's.
    """
    method = update.method
    assert isinstance(method, Padded)
    scale = method.direction.scale if isinstance(method, DoRA) else method.scale
    mask = jnp.where(jnp.arange(rank) < method.rank, _as_array(scale), 0)
    method = dataclasses.replace(method, rank=rank, alpha=None, rank_stabilized=False)
    return _map_rank(dataclasses.replace(update, method=method, rank_mask=mask), functools.partial(_pad, rank=rank))


def _pad(array: jax.Array, axis: int, rank: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rank - array.shape[axis])
    return jnp.pad(array, widths)


def without_padding(update: Update) -> Update:
    """The inverse of `pad_rank`, for arrays with known values: the same update with its own rank and alpha."""
    update = with_static_scale("", update)
    if update.rank_mask is None or not isinstance(update.method, Padded):
        return update
    rank = int(jnp.count_nonzero(update.rank_mask))
    scale = float(update.rank_mask[0])
    method = dataclasses.replace(update.method, rank=rank, alpha=None if scale == 1 else scale * rank)
    return _map_rank(
        dataclasses.replace(update, method=method, rank_mask=None),
        lambda array, axis: jax.lax.slice_in_dim(array, 0, rank, axis=axis),
    )


def _map_rank(update: Update, fn: Callable[[jax.Array, int], jax.Array]) -> Update:
    """Applies `fn(array, axis)` to every array that has an axis of ranks."""
    declared = {name: expand(text, update.axes) for name, text in update.declared.items()}

    def mapped(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: fn(array, declared[name].index("rank")) if "rank" in declared[name] else array
            for name, array in arrays.items()
        }

    groups = {group: mapped(getattr(update, group)) for group in ("factors", "frozen", "initial")}
    return dataclasses.replace(update, **groups)


def with_array_scale(update: Update) -> Update:
    """The update with its whole scale as an array, which never compiles again."""
    scale = update.scale if update.traced_scale is None else update.scale * update.traced_scale
    return dataclasses.replace(update, scale=1.0, traced_scale=_as_array(scale))


def _as_array(scale: Any) -> jax.Array:
    """A scale in the dtype of Python's numbers: float64 with `jax_enable_x64`, whatever the factors, else float32."""
    return jnp.asarray(scale, float)


def absent(update: Update) -> Update:
    """An update of the same form that leaves the base as it is: its scale is zero.

    The factors are one, not zero, because some methods divide by their norms.
    """

    def fill(array: jax.Array) -> jax.Array:
        return jnp.ones_like(array) if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.zeros_like(array)

    return dataclasses.replace(jax.tree.map(fill, update), scale=1.0, traced_scale=_as_array(0.0))


def _without_step_state(path: str, name: str, update: Update) -> Update:
    if update.rank_mask is not None:
        raise ValueError(
            f"{name}: {path} has a rank mask of jlora.with_rank. Call with_rank inside the loss, and stack the adapter "
            "itself."
        )
    return dataclasses.replace(update, key=None)


def _check_equal(path: str, updates: Mapping[str, Update], field: str, noun: str) -> None:
    values = {name: getattr(update, field) for name, update in updates.items()}
    if len(set(values.values())) > 1:
        raise ValueError(
            f"{path}: the members were made for different {noun}: {values}. Stack adapters of one base only."
        )


def _with_dropout_rate(path: str, updates: Mapping[str, Update], dropout: float | None) -> dict[str, Update]:
    if dropout is not None:
        updates = {name: _replace_dropout(update, dropout) for name, update in updates.items()}
    rates = {name: update.method.dropout for name, update in updates.items()}
    if len(set(rates.values())) > 1:
        raise ValueError(
            f"{path}: the members have different dropout rates, {rates}, and one program has one rate. Pass dropout= "
            "with the rate of all, 0.0 for inference."
        )
    return dict(updates)


def _replace_dropout(update: Update, dropout: float) -> Update:
    if update.method.dropout == dropout or "dropout" not in {f.name for f in dataclasses.fields(update.method)}:
        return update
    return dataclasses.replace(update, method=dataclasses.replace(update.method, dropout=dropout))


def is_equal_up_to_rank(first: Method, second: Method) -> bool:
    """Whether two methods are equal, or differ in the rank and the scale alone, and ranks can be padded."""
    if not isinstance(first, Padded) or not isinstance(second, Padded):
        return first == second
    neutral = {"rank": 1, "alpha": None, "rank_stabilized": False}
    return dataclasses.replace(first, **neutral) == dataclasses.replace(second, **neutral)


def exact_lora(path: str, name: str, update: Update, params: Any) -> Update:
    """The update as a LoRA whose two matrices are trained.

    Arguments:
        path, name: of the weight and of the member, for errors.
        update: the update.
        params: the base parameters; None unless its method depends on them.

    Raises:
        ValueError: if it has no equal LoRA.
    """
    method = update.method
    if isinstance(method, LoRA) and not update.initial and update.layers is None:
        plain = dataclasses.replace(method, freeze_a=False, freeze_b=False)
        return dataclasses.replace(update, method=plain, factors={**update.frozen, **update.factors}, frozen={})
    try:
        converted, errors = to_lora({path: update}, params)
    except ValueError as error:
        raise ValueError(
            f"{name}: {path} has the method {method!r}, other members have another one, and it has no equal LoRA: "
            f"{error}"
        ) from error
    if not isinstance(converted[path].method, LoRA) or errors[path] > 1e-5:
        raise ValueError(
            f"{name}: {path} has the method {method!r}, other members have another one, and it has no equal LoRA. "
            "Use one method for this path in all members."
        )
    return converted[path]
