"""One optimiser for all members of a bank, with a state of its own for each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jlora.bank.bank import Bank
from jlora.methods._base import Adapter, Update


class BankState(NamedTuple):
    """The state of `jlora.bank.optimiser`.

    Arguments:
        members: the state of the members' optimiser, every array with a leading axis of members.
        active: (members,), False for members that are retired.
    """

    members: Any
    active: jax.Array


def optimiser(
    tx: optax.GradientTransformation | Callable[..., optax.GradientTransformation], **hyperparameters: Any
) -> optax.GradientTransformation:
    """Optimises every member of a bank by itself: moments, step counts, clipping and hyper-parameters are its own.

    It equals one optimiser for each adapter, run separately. Only factors train; scales, rank masks and frozen arrays
    stay as they are, whatever the transformation does (weight decay, noise).

    Arguments:
        tx: a transformation for one adapter; or a function that makes one of hyper-parameters, such as `optax.adamw`.
        hyperparameters: of that function: numbers that all members share, or arrays (members,) with one for each.

    Returns:
        the transformation; its `init` takes a bank, its `update` gradients of a bank, the state and the bank.

    Raises:
        TypeError: if hyper-parameters are passed with a transformation, or `init` gets no bank.
        ValueError: from `init`, if an array of hyper-parameters does not have one entry for each member.

    Example:
        tx = jlora.bank.optimiser(optax.adamw, learning_rate=jnp.array([1e-4, 3e-4]), weight_decay=0.01)
        state = tx.init(bank)
        gradients = jax.grad(lambda bank: jlora.bank.vmap(loss)(params, bank, batches).sum())(bank)
        updates, state = tx.update(gradients, state, bank)
        bank = optax.apply_updates(bank, updates)
    """
    if isinstance(tx, optax.GradientTransformation):
        if hyperparameters:
            raise TypeError(
                "Hyper-parameters belong to a function such as optax.adamw; tx is a transformation already."
            )
        member_tx = tx
        make = None
    else:
        make = optax.inject_hyperparams(tx)
        member_tx = None

    def transformation(values: dict[str, Any]) -> optax.GradientTransformation:
        return member_tx if member_tx is not None else make(**values)  # pyright: ignore[reportOptionalCall]

    def init(params: Any) -> BankState:
        bank = _as_bank(params)
        values = {name: _per_member(name, value, bank) for name, value in hyperparameters.items()}
        states = jax.vmap(lambda member, values: transformation(values).init(member))(bank.adapter, values)
        return BankState(states, jnp.ones(len(bank), bool))

    def update(updates: Any, state: BankState, params: Any = None) -> tuple[Any, BankState]:
        bank, gradients = _as_bank(params), _as_bank(updates)
        start = dict.fromkeys(hyperparameters, 0.0)  # the state holds the values

        def step(gradient: Adapter, state: Any, member: Adapter, is_active: jax.Array) -> tuple[Adapter, Any]:
            gradient = {path: _factors_alone(part, is_active) for path, part in gradient.items()}
            change, new = transformation(start).update(cast(Any, gradient), state, cast(Any, member))
            change = {path: _factors_alone(part, is_active) for path, part in cast(Adapter, change).items()}
            return change, jax.tree.map(functools.partial(jnp.where, is_active), new, state)

        change, members = jax.vmap(step)(gradients.adapter, state.members, bank.adapter, state.active)
        return dataclasses.replace(gradients, adapter=change), BankState(members, state.active)

    return optax.GradientTransformation(init, cast(Any, update))


def retire(state: BankState, bank: Bank, name: str) -> BankState:
    """Stops the training of a member; the others go on, in the same compiled program.

    Arguments:
        state: of `jlora.bank.optimiser`.
        bank: the bank that it optimises.
        name: of the member.

    Raises:
        KeyError: if there is no such member.
    """
    return state._replace(active=state.active.at[bank.position(name)].set(False))


def restart(
    tx: optax.GradientTransformation, state: BankState, bank: Bank, name: str, adapter: Adapter
) -> tuple[Bank, BankState]:
    """Puts a new adapter in the place of a member, with a new state of its optimiser.

    Arguments:
        tx, state: the optimiser of the bank, and its state.
        bank: the bank.
        name: of the member, which may be retired.
        adapter: its new value.

    Returns:
        the bank and the state.

    Raises:
        KeyError: if there is no such member.
        ValueError: if the adapter does not fit the bank.
    """
    position, bank = bank.position(name), bank.replace(name, adapter)
    fresh = tx.init(cast(Any, bank))
    states = jax.tree.map(lambda old, new: old.at[position].set(new[position]), state, fresh)
    return bank, states


def _as_bank(tree: Any) -> Bank:
    if not isinstance(tree, Bank):
        raise TypeError(
            f"The optimiser of a bank takes a bank, found {type(tree).__name__}. Pass the bank to init, and gradients "
            "with respect to the bank, the state and the bank to update."
        )
    return tree


def _per_member(name: str, value: Any, bank: Bank) -> jax.Array:
    array = jnp.asarray(value)
    if array.ndim == 0:
        return jnp.broadcast_to(array, (len(bank),))
    if array.shape != (len(bank),):
        raise ValueError(f"{name} has shape {array.shape}; expected a number, or ({len(bank)},), one for each member.")
    return array


def _factors_alone(change: Update, is_active: jax.Array) -> Update:
    """A gradient or a change of the factors, zero for all other arrays and for members that are retired.

    A gradient with respect to a scale would count in the norm by which gradients are clipped.
    """
    zeros = jax.tree.map(jnp.zeros_like, change)
    factors = {name: jnp.where(is_active, array, zeros.factors[name]) for name, array in change.factors.items()}
    return dataclasses.replace(zeros, factors=factors)
