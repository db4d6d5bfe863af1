"""A product with an adapted weight on the CPU: the sum of two products, which waits for the bias that follows.

    y = (x W + bias) + x A B

The term that is added last decides what XLA's CPU backend keeps in memory until the backward pass: the sum, if that
term is as large as the sum and kept apart (`apart`), else both products. So a bias goes onto the first product.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn
from jlora._ops.apart import apart

_OF_BOTH_TERMS = ("reshape", "transpose")


class PendingSum(NamedTuple):
    """Two terms of one shape. An equation that is not in `waiting_operands`' list meets its value.

    Arguments:
        base: the product with the base.
        low: the sum of the products with the networks.
    """

    base: jax.Array
    low: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def value(self) -> jax.Array:
        """The sum."""
        is_traced = _compat.is_tracer(self.base) and _compat.has_no_mesh(*self)
        return (_traced_once if is_traced else _added)(*self, is_for_cpu=_compat.is_for_cpu(*self))

    def after(self, eqn: Eqn, operands: Sequence[Any]) -> "PendingSum":
        """What an equation makes of the sum, which is one of its operands.

        Arguments:
            eqn: an equation that `waiting_operands` names the sum for.
            operands: the sum, and arrays.
        """

        def bind(term: jax.Array) -> jax.Array:
            return _compat.bind(eqn, *(term if v is self else v for v in operands))[0]

        return PendingSum(bind(self.base), bind(self.low) if eqn.primitive.name in _OF_BOTH_TERMS else self.low)


def _added(base: jax.Array, low: jax.Array, *, is_for_cpu: bool) -> jax.Array:
    return base + (apart(low) if is_for_cpu else low)


# Differentiated once for all sums of one shape. The program has no `jit` of it.
_traced_once = jax.jit(_added, static_argnames="is_for_cpu", inline=True)


def add_up(base: jax.Array, terms: Iterable[jax.Array], *, is_for_cpu: bool) -> jax.Array | PendingSum:
    """The product with the base plus those with the networks, in order: pending if the program is for the CPU."""
    if not is_for_cpu:
        return functools.reduce(jnp.add, terms, base)
    computed = list(terms)
    return PendingSum(base, functools.reduce(jnp.add, computed)) if computed else base


def waiting_operands(eqn: Eqn, env: Mapping[Any, Any], unneeded: Collection[Any]) -> list[Any]:
    """The operand of an equation that is a pending sum and need not be added up for it, in a list; else no operand.

    Arguments:
        eqn: the equation.
        env: the values of the variables.
        unneeded: the variables that no later equation reads.
    """
    variables = [atom for atom in eqn.invars if not _compat.is_literal(atom) and atom in unneeded]
    return [atom for atom in variables if isinstance(env[atom], PendingSum) and _can_wait(eqn, atom)]


def _can_wait(eqn: Eqn, operand: Any) -> bool:
    """Whether an equation moves the entries of an operand, or adds something smaller to it."""
    name = eqn.primitive.name
    if name in _OF_BOTH_TERMS:
        return True
    if name not in ("add", "sub"):
        return False
    left, right = eqn.invars
    other = right if operand is left else left
    shapes = [_compat.aval(atom).shape for atom in (operand, eqn.outvars[0], other)]
    return shapes[0] == shapes[1] != shapes[2] and (name == "add" or operand is left)
