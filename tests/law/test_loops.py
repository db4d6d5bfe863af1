"""The law in loops whose length differs from row to row of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support.agreement import adapter_for, difference

Carry = tuple[jax.Array, jax.Array, jax.Array]


def constant(w: jax.Array, x: jax.Array, steps: jax.Array) -> jax.Array:
    """The loop closes over the weight."""
    return lax.fori_loop(0, steps, lambda _, h: x + 0.1 * (h @ w), x)


def carried(w: jax.Array, x: jax.Array, steps: jax.Array) -> jax.Array:
    """The loop carries the weight, and does not change it."""

    def body(carry: Carry) -> Carry:
        k, w, h = carry
        return k + 1, w, x + 0.1 * (h @ w)

    return lax.while_loop(lambda carry: carry[0] < steps, body, (jnp.int32(0), w, x))[2]


def changed(w: jax.Array, x: jax.Array, steps: jax.Array) -> jax.Array:
    """Every step halves the weight."""

    def body(carry: Carry) -> Carry:
        k, w, h = carry
        return k + 1, 0.5 * w, x + 0.1 * (h @ w)

    return lax.while_loop(lambda carry: carry[0] < steps, body, (jnp.int32(0), w, x))[2]


@pytest.mark.parametrize("shared", [True, False], ids=["one weight", "a weight for each row"])
@pytest.mark.parametrize("loop", [constant, carried, changed], ids=lambda loop: loop.__name__)
def test_each_row_of_a_batch_runs_its_own_number_of_steps(loop: Callable[..., jax.Array], shared: bool) -> None:
    rng, steps = np.random.default_rng(0), np.array([0, 1, 3], np.int32)
    params = {"w": jnp.asarray(rng.normal(size=(4, 4) if shared else (3, 4, 4)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)

    def fun(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(loop, (None if shared else 0, 0, 0))(params["w"], x, steps)

    adapter = adapter_for(jlora.trace(fun, params, x), {"w": jlora.LoRA(rank=1)}, rng)
    ours = jax.jvp(lambda a: jlora.adapt(fun, on_dense="allow")(params, a, x), (adapter,), (adapter,))
    merged = jax.jvp(lambda a: fun(jlora.merge(params, a), x), (adapter,), (adapter,))
    assert difference(ours, merged) < 2e-5
    alone = jlora.merge(params, adapter)["w"]
    rows = [loop(alone if shared else alone[k], x[k], jnp.int32(n)) for k, n in enumerate(steps)]
    np.testing.assert_allclose(ours[0], jnp.stack(rows), rtol=2e-5, atol=1e-5)
