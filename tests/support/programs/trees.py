"""What programs do to trees of parameters, inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.support import weight_uses
from tests.support.programs.program import Tree, Use


def is_float(a: Any) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def total(tree: Tree) -> jax.Array:
    """A scalar that depends on every output, with second derivatives that are not zero."""
    return functools.reduce(jnp.add, [jnp.sum(bend(a.astype(jnp.float32))) for a in jax.tree.leaves(tree)])


def vary(x: Tree, k: Any) -> Tree:
    """The inputs as step `k` of a loop sees them; integers (rows of a table) are unchanged."""
    return jax.tree.map(lambda a: a * jnp.asarray(1 + 0.25 * k, a.dtype) if is_float(a) else a, x)


def pair(x: Tree) -> Tree:
    """Two inputs, stacked."""
    return jax.tree.map(lambda a: jnp.stack([a, jnp.roll(a, 1, axis=-1)]), x)


def bend(tree: Tree) -> Tree:
    """A nonlinearity of every output that compiles fast."""
    return jax.tree.map(weight_uses.bend, tree)


def plus(a: Tree, b: Tree) -> Tree:
    """The sum of two outputs."""
    return jax.tree.map(jnp.add, a, b)


def zeros(use: Use, params: Tree, x: Tree) -> Tree:
    """Zeros of the shapes and dtypes of the output."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(use, params, x))


def layer(params: Tree, k: Any) -> Tree:
    """Entry `k` of every stacked array."""
    return jax.tree.map(lambda a: a[k], params)


def sign(x: Tree) -> jax.Array:
    """A condition that depends on the inputs."""
    return next(jnp.sum(a) > 0 for a in jax.tree.leaves(x) if is_float(a))


def floats(x: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The floating-point inputs, and a function that returns all inputs with others in their place."""
    some = {k: a for k, a in x.items() if is_float(a)}
    return some, lambda new: {**x, **new}
