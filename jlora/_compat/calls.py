"""Calls that XLA does not inline."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def reshape_apart(x: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
    """`x.reshape(shape)` as a call that XLA does not inline, and so does not fuse into what computes `x`.

    If an activation is read in two shapes, XLA's CPU backend otherwise computes and stores it once for each: it moves
    the reshapes into fusions, and a fusion has one result. An optimisation barrier is gone before that.
    """
    with set_xla_metadata(inlineable="false"):
        return _reshape(x, shape)


_reshape = jax.jit(jnp.reshape, static_argnums=1)


def call_apart(jitted: Callable[..., Any], *args: Any) -> Any:
    """A call of a jitted function that XLA does not inline: no part of it is computed before all operands are there."""
    with set_xla_metadata(inlineable="false"):
        return jitted(*args)
