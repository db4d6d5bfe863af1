"""Models with batch statistics and dropout."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from tests.support.third_party.case import (
    WIDTH,
    Case,
    numbers,
)


class Noisy(nn.Module):
    """Batch statistics and dropout, with an argument that is static."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(12, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(0.4, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="down")(x)


def linen_batch_statistics() -> Case:
    module, x = Noisy(), numbers(6, WIDTH)
    variables = module.init(jax.random.key(0), x, train=False)
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}
    return Case(module.apply, variables, (x,), {"params/up/kernel", "params/down/kernel"}, kwargs)


class NoisyNnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.down = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


def nnx_batch_statistics() -> Case:
    graph, params, rest = nnx.split(NoisyNnx(nnx.Rngs(0)), nnx.Param, ...)

    def fun(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)  # the statistics change inside of a gradient
        y = model(x)
        return y, nnx.state(model, nnx.Not(nnx.Param))

    return Case(fun, params, (rest, numbers(6, WIDTH)), {"up/kernel", "down/kernel"})


def nnx_whole_model() -> Case:
    """Split into graph and state alone: keys, counters and statistics are among the parameters."""
    graph, params = nnx.split(NoisyNnx(nnx.Rngs(0)))

    def fun(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, copy=True)
        y = model(x)
        return y, nnx.state(model, nnx.Not(nnx.Param))

    return Case(fun, params, (numbers(6, WIDTH),), {"up/kernel", "down/kernel"})


CASES = [
    linen_batch_statistics,
    nnx_batch_statistics,
    nnx_whole_model,
]
