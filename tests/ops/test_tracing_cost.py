"""What a layer adds to tracing and lowering: calls of Python functions, and equations of the gradient."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora._compat import bodies

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


def model(params: Any, x: Any) -> Any:
    for w in params:
        x = x + jax.nn.gelu(x @ w)
    return x.sum()


def base(layers: int) -> Any:
    return model, ([jnp.ones((WIDTH, WIDTH))] * layers, jnp.ones((3, WIDTH)))


def adapted(layers: int) -> Any:
    _, (params, x) = base(layers)
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, x), jlora.LoRA(2))
    return lambda adapter, params, x: jlora.adapt(model)(params, adapter, x), (adapter, params, x)


def by_hand(layers: int) -> Any:
    def fun(factors: Any, params: Any, x: Any) -> Any:
        for w, (a, b) in zip(params, factors, strict=True):
            x = x + jax.nn.gelu(x @ w + 0.5 * (x @ a @ b))
        return x.sum()

    factors = [(jnp.ones((WIDTH, 2)), jnp.ones((2, WIDTH)))] * layers
    return fun, (factors, *base(layers)[1])


def test_a_layer_is_traced_at_the_cost_of_one_by_hand() -> None:
    added = {}
    for make in (base, adapted, by_hand):
        calls_of_lowering(make, 2)
        added[make] = calls_of_lowering(make, 12) - calls_of_lowering(make, 4)
    assert added[adapted] < 1.2 * added[by_hand], (added[adapted], added[by_hand])
    assert added[adapted] < 2 * added[base], (added[adapted], added[base])


def equations(make: Any, layers: int) -> int:
    fun, arguments = make(layers)

    def count(jaxpr: Any) -> int:
        inner = ([body for body, _ in bodies(eqn)] for eqn in jaxpr.eqns)
        return sum(sum(map(count, programs)) if programs else 1 for programs in inner)

    return count(jax.make_jaxpr(jax.grad(fun))(*arguments).jaxpr)


def test_a_layer_adds_ten_equations_to_the_gradient() -> None:
    """Forward: two products, the name, the barrier, the sum. Backward: the barrier, four products, the sum.

    The base's own gradient has one product that the adapted one lacks: that of the weight.
    """
    added = {make: [equations(make, k + 1) - equations(make, k) for k in (2, 3, 9)] for make in (adapted, base)}
    assert added[adapted] == [n + 5 + 6 - 1 for n in added[base]] == [added[adapted][0]] * 3, added
