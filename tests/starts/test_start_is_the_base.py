"""After EVA, CorDA and LoRA-GA the adapted program is the base program, for every kind of weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.quantized import quantized
from tests.support.references import error
from tests.support.weight_uses import KINDS, Kind

Tree = Any


def started_adapters(fun: Any, params: Tree, x: Tree, adapter: Tree) -> dict[str, Tree]:
    """The adapter after each of the starts."""
    inputs = jax.jit(jlora.calibrate(fun, adapter))(params, x)

    def loss(adapter: Tree) -> jax.Array:
        return jnp.sum(jlora.adapt(fun)(params, adapter, x) ** 2)

    return {
        "eva": jlora.eva(adapter, inputs, rho=1),
        "corda": jlora.corda(adapter, inputs, params, mode="instruction"),
        "lora_ga": jlora.lora_ga(jax.random.key(1), adapter, jax.jit(jax.grad(loss)), passes=2),
    }


def equals_the_base(fun: Any, params: Tree, x: Tree, adapters: dict[str, Tree], bound: float = 2e-5) -> None:
    """At the start the program is the base, and some factor of every weight has a gradient."""

    def run(params: Tree, adapters: Tree) -> Tree:
        adapted = jlora.adapt(fun)
        losses = {name: lambda a: jnp.sum(adapted(params, a, x) ** 2) for name in adapters}
        return (
            fun(jlora.dequantize(params), x),
            {name: adapted(params, a, x) for name, a in adapters.items()},
            {name: jax.grad(losses[name])(a) for name, a in adapters.items()},
        )

    base, outputs, gradients = jax.jit(run)(params, adapters)
    for name, y in outputs.items():
        assert error(y, base) < bound, name
        for path, update in gradients[name].items():
            assert max(float(jnp.abs(g).max()) for g in update.factors.values()) > 0, (name, path)


@pytest.mark.nightly
def test_at_the_start_a_quantised_program_is_the_base() -> None:
    """With stacked weights and a tied embedding, in NF4."""
    params = quantized("nf4")
    sites, method = toy_model.sites(), jlora.LoRA(2, alpha=3.0)
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, {"embed|layers/up|mix/kernel": method}))
    starts = started_adapters(toy_model.model, params, toy_model.tokens(), adapter)
    equals_the_base(toy_model.model, params, toy_model.tokens(), starts)


NOT_RECORDED = {"without_gradient", "axes_regrouped", "sliced"}
NOT_RECORDED |= {kind.name for kind in KINDS if kind.name.startswith("weights_multiplied")}
NOT_RECORDED |= {"ragged_experts"}  # one of them has no rows


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name not in NOT_RECORDED], ids=lambda kind: kind.name)
def test_at_the_start_every_kind_of_weight_is_the_base(kind: Kind) -> None:
    params, inputs = jax.tree.map(jnp.asarray, kind.values(np.random.default_rng(1)))
    sites = jlora.trace(kind.use, params, inputs)
    adapter = jlora.init(jax.random.key(0), sites, {path: jlora.LoRA(1, alpha=3.0) for path in kind.weights})
    if any(sites[path].max_rank < 2 for path in kind.weights):
        with pytest.raises(ValueError, match="Lower the rank"):
            jlora.lora_ga(jax.random.key(1), adapter, lambda probe: probe)
        return
    fun: Callable[..., Any] = lambda p, x: jnp.nan_to_num(kind.use(p, x).astype(jnp.float32))  # noqa: E731
    starts = started_adapters(fun, params, inputs, adapter)
    equals_the_base(fun, params, inputs, starts, 2**-6 if kind.coarse else 2e-5)
