"""One batch, many adapters, in programs with loops over layers: a step gathers the factors of its layer alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.compiled import memory

LAYERS, WIDTH = 4, 6
PARAMS = {"w": np.random.default_rng(8).normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32) / 3}


def loop(params: Any, x: Any) -> Any:
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0]


def prepared(params: Any, x: Any) -> Any:
    """Layers that are cast, transposed and reversed before a loop, and that it returns."""
    turned = params["w"].astype(jnp.float16).astype(jnp.float32).swapaxes(1, 2)
    x, layers = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), w), x, turned, reverse=True)
    return x @ layers[2]


def nested(params: Any, x: Any) -> Any:
    """Layers that are constants of a loop around theirs, and layers in pairs."""
    x = jax.lax.scan(lambda x, _: (loop(params, x), None), x, None, length=2)[0]
    pairs = params["w"].reshape(2, LAYERS // 2, WIDTH, WIDTH)
    return jax.lax.scan(lambda x, w: (loop({"w": w}, x), None), x, pairs)[0]


def row_by_row(params: Any, x: Any) -> Any:
    """A number of steps and a branch that differ from row to row, and a use without a loop."""

    def step(state: Any) -> Any:
        number, x, w = state
        return number + 1, loop({"w": w}, x), w

    count = (3 * jnp.abs(x[0, 0])).astype(int)
    _, x, w = jax.lax.while_loop(lambda state: state[0] < count, step, (0, x, params["w"]))
    x = jax.lax.cond(count % 2, lambda x: loop(params, x), lambda x: x @ params["w"][1], x)
    return x @ w[0] @ params["w"][-1]


def bank_for(dtype: Any = jnp.float32) -> jlora.bank.Bank:
    """Members of rank 1 and 2."""
    sites = jlora.trace(loop, PARAMS, jax.ShapeDtypeStruct((1, WIDTH), jnp.float32))

    def member(k: int) -> Any:
        shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, jlora.LoRA(1 + k % 2, alpha=2.0)))
        return jax.tree.map(lambda a: a.astype(dtype), toy_model.nonzero(shapes, k))

    return jlora.bank.stack({str(k): member(k) for k in range(3)})


@pytest.mark.drawn(3)
@pytest.mark.parametrize("fun", [prepared, nested, row_by_row])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_row_has_its_member(fun: Any, dtype: Any) -> None:
    """The base and an unknown id among the rows, each against its merged weights; narrow factors are widened."""
    bank, x = bank_for(dtype), np.random.default_rng(3).normal(size=(6, WIDTH)).astype(np.float32)
    out = jax.jit(jlora.bank.apply(fun, block=1, on_dense="allow"))(PARAMS, bank, jnp.array([2, -1, 0, 1, 2, 7]), x)
    for k, adapter in enumerate([bank["2"], {}, bank["0"], bank["1"], bank["2"]]):
        want = jax.jit(fun)(jlora.merge(PARAMS, adapter), x[k : k + 1])
        np.testing.assert_allclose(out[k : k + 1], want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    assert np.isnan(out[5]).all()


@pytest.mark.parametrize("block", [1, 2])
def test_gradients(block: int) -> None:
    """Each member's gradient is the sum over its rows; a member without rows has none."""
    bank, x = bank_for(), np.random.default_rng(3).normal(size=(4, WIDTH)).astype(np.float32)
    ids, apply = np.array([2, 0, -1, 2]), jlora.bank.apply(loop, block=block)
    gradient = jax.jit(jax.grad(lambda bank: (apply(PARAMS, bank, ids, x) ** 2).sum()))(bank)
    for k, name in enumerate(bank):
        rows = x[ids == k]
        want = jax.grad(lambda a, rows=rows: (jlora.adapt(loop)(PARAMS, a, rows) ** 2).sum())(bank[name])
        padded = jlora.bank.stack({"alone": want}, rank=2).adapter["w"].factors
        for factor, value in gradient.adapter["w"].factors.items():
            np.testing.assert_allclose(value[k], padded[factor][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2])
def test_the_factors_of_one_layer_are_held(block: int) -> None:
    """Those of all layers would be 16 times as large."""
    layers, width, rows = 16, 64, 8
    params, x = {"w": jnp.ones((layers, width, width))}, jnp.ones((rows, width))
    adapter = jlora.init(jax.random.key(0), jlora.trace(loop, params, x), jlora.LoRA(8))
    bank = jlora.bank.stack({str(k): adapter for k in range(2 * rows)})
    compiled = jax.jit(jlora.bank.apply(loop, block=block)).lower(params, bank, jnp.arange(rows), x).compile()
    of_all_rows = rows * sum(a.nbytes for a in adapter["w"].factors.values())
    assert memory(compiled).temp_size_in_bytes < of_all_rows / 4
