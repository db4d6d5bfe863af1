"""What a layer adds to tracing and lowering, counted in calls of Python functions."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

import jlora

WIDTH = 8


def calls_of_lowering(make: Any, layers: int) -> int:
    fun, arguments = make(layers)
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        jax.jit(jax.grad(fun)).lower(*arguments)
    finally:
        sys.setprofile(None)
    return count


def adapted(layers: int) -> Any:
    def model(params: Any, x: Any) -> Any:
        for w in params:
            x = jnp.tanh(x @ w)
        return x.sum()

    params, x = [jnp.ones((WIDTH, WIDTH))] * layers, jnp.ones((3, WIDTH))
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, x), jlora.LoRA(2))
    return lambda adapter, params, x: jlora.adapt(model)(params, adapter, x), (adapter, params, x)


def by_hand(layers: int) -> Any:
    def fun(factors: Any, params: Any, x: Any) -> Any:
        for w, (a, b) in zip(params, factors, strict=True):
            x = jnp.tanh(x @ w + x @ a @ b)
        return x.sum()

    factors = [(jnp.ones((WIDTH, 2)), jnp.ones((2, WIDTH)))] * layers
    return fun, (factors, [jnp.ones((WIDTH, WIDTH))] * layers, jnp.ones((3, WIDTH)))


def test_a_layer_is_traced_at_the_cost_of_one_by_hand() -> None:
    added = {}
    for make in (adapted, by_hand):
        calls_of_lowering(make, 2)
        added[make] = calls_of_lowering(make, 48) - calls_of_lowering(make, 16)
    assert added[adapted] < 1.5 * added[by_hand], (added[adapted], added[by_hand])
