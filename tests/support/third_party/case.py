"""A layer of another library as a function of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora
from tests.support.agreement import random

WIDTH, BATCH, TIME = 8, 2, 5
EVERY_PRODUCT = jlora.LoRA(rank=2, alpha=3.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and the paths of the weights that must be adapted if the targets are a method without paths.

    Arguments:
        fun: `fun(params, *args, **kwargs)`.
        params: its parameters.
        args: arrays.
        paths: the weights that products and convolutions use.
        kwargs: passed to `fun` unchanged.
        targets: what is adapted, if it is not every product.
    """

    fun: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    paths: set[str]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: Any = EVERY_PRODUCT


def numbers(*shape: int) -> jax.Array:
    """Random numbers, the same for the same shape."""
    return random(np.random.default_rng(1), shape, jnp.float32)


def tokens() -> jax.Array:
    """Indices of a vocabulary of seven."""
    return jnp.arange(BATCH * TIME).reshape(BATCH, TIME) * 3 % 7


def linen(module: nn.Module, *args: Any, paths: set[str], **kwargs: Any) -> Case:
    """A Linen module, whose parameters are those of its `init`."""
    variables = jax.jit(module.init, static_argnames=("method",))(jax.random.key(0), *args, **kwargs)
    return Case(module.apply, variables, args, {f"params/{path}" for path in paths}, kwargs)


def of_nnx(module: nnx.Module, *args: Any, paths: set[str], call: str = "__call__") -> Case:
    """An NNX module, split into its graph and its parameters."""
    graph, params = nnx.split(module)
    return Case(lambda params, *args: getattr(nnx.merge(graph, params), call)(*args), params, args, paths)


def of_eqx(module: Any, *args: Any, paths: set[str], targets: Any = EVERY_PRODUCT) -> Case:
    """An Equinox module, which is its own parameters, over a batch."""
    return Case(lambda module, *args: jax.vmap(module)(*args), module, args, paths, targets=targets)
