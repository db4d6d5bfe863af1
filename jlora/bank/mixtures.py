"""One batch, mixtures of adapters: every row has a weight for each member of a bank."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter.adapt import adapt
from jlora._ir.materialize import widest_dtype
from jlora.bank.bank import Bank
from jlora.bank.rows import axes_of_leaves, count_rows, map_rows
from jlora.methods._base import Adapter, Update
from jlora.methods._common.factor_axes import expand
from jlora.methods.adalora import AdaLoRA
from jlora.methods.lora import LoRA

Weights = jax.Array | Mapping[str, jax.Array]


def mix(fun: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0, **options: Any) -> Callable[..., Any]:
    """Turns a function of base parameters and a batch into one whose rows use different mixtures of a bank's adapters.

        g(params, bank, weights, x)[i] == f(W + sum_k weights[i, k] (merge(W, bank[k]) - W), x[i:i+1])[0]

    The members' factors are joined along the rank, and the weights multiply the ranks: `(x [A_1 ... A_K]) diag(c_i)
    [B_1; ...; B_K]` with the same factors for all rows, so a mixture costs a LoRA with the ranks of all members, and no
    factor is copied for each row. The weights are differentiable: a router of any form computes them from the row, its
    task, or hidden states of the base, and is trained with the adapters or alone.

    Arguments:
        fun: `fun(params, *args)`, as for `jlora.adapt`. It gets batches of one row.
        in_axes: the axis of rows in each of `args`, as for `jax.vmap`.
        out_axes: the axis of rows in the results.
        options: those of `jlora.adapt`.

    Returns:
        `g(params, bank, weights, *args, **kwargs)`. The weights are (rows, members), in the order of the bank; zeros
        are the base. Or a dict from paths to such arrays, for weights that differ between layers: then a path of
        stacked layers takes (rows, members), or (rows, *stack, members). All rows share the keywords.

    Raises:
        TypeError: from `g`, if `bank` is not a bank.
        ValueError: from `g`, if the weights do not fit the rows, the members or the paths, or a method is not `LoRA`.

    Example:
        weights = jax.nn.softmax(router(features))                  # (rows, members)
        logits = jlora.bank.mix(model.apply)(params, bank, weights, tokens)

    Ponti et al. 2022, Combining Modular Skills in Multitask Learning, arXiv:2202.13914.
    """
    adapted = adapt(fun, **options)

    def mixed(params: Any, bank: Bank, weights: Weights, *args: Any, **kwargs: Any) -> Any:
        axes, structure = axes_of_leaves(in_axes, args), jax.tree.structure(args)
        rows = count_rows(args, axes)
        shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(weights)}
        if shapes != {(rows,)}:
            raise ValueError(f"The arguments have {rows} rows, and the weights the first axes {sorted(shapes)}.")

        def of_row(weights: Weights, *leaves: Any) -> Any:
            return adapted(params, mixture(bank, weights), *jax.tree.unflatten(structure, leaves), **kwargs)

        return map_rows(of_row, weights, 0, jax.tree.leaves(args), axes, out_axes)

    return mixed


def mixture(bank: Bank, weights: Weights) -> Adapter:
    """One mixture of a bank's adapters as an adapter, for `jlora.adapt` and `jlora.merge`.

        merge(W, mixture(bank, c)) == W + sum_k c_k (merge(W, bank[k]) - W)

    Arguments:
        bank: the bank, of `LoRA`.
        weights: (members,), or a dict from every path of the bank to (members,) or, for stacked layers, to
            (*stack, members).

    Returns:
        an adapter of `AdaLoRA`, whose `e` has the weights times the scale of each member; gradients reach the weights
        and the bank.

    Raises:
        TypeError: if `bank` is not a bank.
        ValueError: if the weights do not fit the members or the paths, or a method is not `LoRA`.

    Example:
        merged = jlora.merge(params, jlora.bank.mixture(bank, jnp.array([0.7, 0.3])))
    """
    if not isinstance(bank, Bank):
        raise TypeError(f"Expected a bank, found {type(bank).__name__}: use jlora.bank.stack.")
    if isinstance(weights, Mapping):
        if set(weights) != set(bank.adapter):
            different = sorted(set(weights) ^ set(bank.adapter))
            raise ValueError(f"The weights have other paths than the bank, {', '.join(different[:3])}: give all of it.")
        return {path: _mixed(path, update, weights[path], len(bank)) for path, update in bank.adapter.items()}
    return {path: _mixed(path, update, weights, len(bank)) for path, update in bank.adapter.items()}


def _mixed(path: str, update: Update, weights: Any, members: int) -> Update:
    """The update with the ranks of all members."""
    method = update.method
    if not isinstance(method, LoRA) or update.initial:
        raise ValueError(
            f"{path} has {method!r} in the bank, and mixtures are of LoRA: stack members that jlora.to_lora has "
            "converted."
        )
    axes, weights = update.axes, jnp.asarray(weights)
    stack = axes.sizes("*stack")
    if weights.shape not in ((members,), (*stack, members)):
        options = " or ".join(map(str, dict.fromkeys([(members,), (*stack, members)])))
        raise ValueError(f"{path}: the weights of one row have the shape {weights.shape}, expected {options}.")
    ranks = jnp.ones((members, method.rank), float) if update.rank_mask is None else update.rank_mask
    scales = method.scale * update.scale * ranks
    if update.traced_scale is not None:
        scales = update.traced_scale[:, None] * scales
    dtype = widest_dtype((update.factors, update.frozen, weights))
    scales = jax.lax.stop_gradient(scales).astype(dtype)
    of_members = weights.astype(dtype)[..., None] * scales.reshape(*[1] * (weights.ndim - 1), *scales.shape)
    e = jnp.broadcast_to(of_members, (*stack, *scales.shape)).reshape(*stack, -1)
    places = {name: expand(update.declared[name], axes).index("rank") for name in "ab"}
    p, q = (_join_members(update[name], places[name]) for name in "ab")
    new = AdaLoRA(e.shape[-1], dropout=method.dropout, layers=method.layers)
    return Update({"p": p, "e": e, "q": q}, new, update.roles, update.shape)


def _join_members(factors: jax.Array, rank_axis: int) -> jax.Array:
    """The factors of all members with their ranks in one axis; the first axis is that of members."""
    moved = jnp.moveaxis(factors, 0, rank_axis)
    shape: Sequence[int] = moved.shape
    return moved.reshape(*shape[:rank_axis], shape[rank_axis] * shape[rank_axis + 1], *shape[rank_axis + 2 :])
