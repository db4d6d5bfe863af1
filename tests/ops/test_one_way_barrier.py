"""The barrier of programs for GPUs: it changes no value, and is in one of the two passes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jlora._ops.apart import one_way_barrier

X = jnp.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(("of_cotangent", "barriers"), [(False, [1, 0]), (True, [0, 1])])
def test_one_pass_has_the_barrier(of_cotangent: bool, barriers: list[int]):
    def f(x: jax.Array) -> jax.Array:
        return one_way_barrier(x * x, of_cotangent=of_cotangent)

    def backward(x: jax.Array) -> jax.Array:
        return jax.vjp(f, x)[1](x)[0]

    programs = [jax.jit(f).lower(X), jax.jit(backward).lower(X)]
    assert [program.as_text().count("stablehlo.optimization_barrier") for program in programs] == barriers
    assert jnp.array_equal(f(X), X * X)
    assert jnp.array_equal(backward(X), 2 * X * X)
    assert jnp.array_equal(jax.vmap(f)(X), X * X)
    assert jnp.array_equal(jax.jvp(f, (X,), (X,))[1], 2 * X * X)
