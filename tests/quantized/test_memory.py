"""What is dequantised, and how many bytes that takes: one layer of a stack, some rows of a table."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import compiled as report
from tests.support import toy_model
from tests.support.int8_rows import rounded
from tests.support.quantized import in_blocks, weight


def test_a_step_holds_one_layer_at_a_time() -> None:
    """No more temporary bytes than on a float base, whose own layers are sliced out of the stack as well."""
    layers, width = 12, 256
    weights = {"w": jnp.asarray(weight(layers, width, width) / 16)}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    x = jnp.ones((16, width))
    sites = jlora.trace(model, weights, x)
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(4))
    adapted = jlora.adapt(model, on_dense="error")

    def memory(params: dict) -> tuple[int, int]:
        step = jax.jit(jax.grad(lambda adapter, params, x: jnp.square(adapted(params, adapter, x)).mean()))
        stats = report.memory(step.lower(adapter, params, x).compile())
        return stats.argument_size_in_bytes, stats.temp_size_in_bytes

    arguments, temporary = memory(weights)
    for form, share in (("int8", 0.3), ("nf4", 0.2)):
        rounded_arguments, rounded_temporary = memory(jlora.quantize(weights, sites, {"w": form}))
        assert rounded_arguments < share * arguments
        assert rounded_temporary <= temporary + 1.1 * width * width * 4


BEFORE_THE_LOOP: dict[str, Callable] = {
    "scaled": lambda w: 0.5 * w,
    "transposed": lambda w: w.swapaxes(0, 1),
    "of a group": lambda w: w.reshape(3, 2, 8, 8)[:, 1],
}


@pytest.mark.parametrize("before", BEFORE_THE_LOOP.values(), ids=BEFORE_THE_LOOP)
def test_a_stack_that_is_changed_before_the_loop(before: Callable) -> None:
    """It is dequantised before the loop, and its update stays factored."""

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, before(p["w"]))[0]

    first = (8, 6, 8) if before is BEFORE_THE_LOOP["transposed"] else (6, 8, 8)
    params, x = {"w": rounded(weight(*first))}, jnp.ones((4, 8))
    adapter = toy_model.random_adapter(jlora.trace(model, params, x), {"w": jlora.LoRA(2)})
    actual = jlora.adapt(model, on_dense="error")(params, adapter, x)
    np.testing.assert_allclose(actual, model(jlora.merge(params, adapter), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("make", [rounded, in_blocks], ids=["rounded", "gguf"])
def test_a_lookup_dequantises_only_its_rows(make: Callable, mode: str) -> None:
    """The table is never dequantised as a whole: not for one token, nor for many, in bounds or out of bounds."""
    table = weight(4096, 64)
    weights = {"w": make(table)}
    ids = jnp.array([[3, 4095, 0], [7, 7, 1]] if mode == "promise_in_bounds" else [[3, 5000, -1], [-5000, 7, 1]])

    def look(params: dict, ids: jax.Array) -> jax.Array:
        return params["w"].at[ids].get(mode=mode)

    for some in (ids, ids[:1, :1], jnp.array([[3, 100]], jnp.uint8)):
        sites = jlora.trace(look, weights, some)
        adapter = jlora.init(jax.random.key(1), sites, {"w": jlora.LoRA(4)})
        expected = look(jlora.merge(weights, adapter), some)
        run = jax.jit(jlora.adapt(look))
        assert np.allclose(run(weights, adapter, some), expected, atol=1e-6, equal_nan=True)
        assert report.memory(run.lower(weights, adapter, some).compile()).temp_size_in_bytes < table.nbytes / 16


def test_a_lookup_in_a_transposed_table() -> None:
    """As many rows as columns, so that shapes do not tell them apart."""
    weights = {"w": in_blocks(weight(64, 64), transposed=True)}
    ids = jnp.array([3, 0, 63])
    sites = jlora.trace(lambda params, ids: params["w"][ids], weights, ids)
    adapter = toy_model.random_adapter(sites, {"w": jlora.LoRA(4)})
    adapted = jlora.adapt(lambda params, ids: params["w"][ids])(weights, adapter, ids)
    assert np.allclose(adapted, jlora.merge(weights, adapter)["w"][ids], atol=1e-6)


def test_no_float_copy_in_the_program() -> None:
    """The gradient keeps codes for its backward pass: no float weight among what the forward pass hands on."""
    params = {"w": rounded(weight(8, 6))}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"].astype(jnp.bfloat16).T)

    x = jnp.ones((3, 6), jnp.bfloat16)
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, x), jlora.LoRA(2))
    adapted = jlora.adapt(model)
    _, pull = jax.vjp(functools.partial(lambda adapter, x: adapted(params, adapter, x)), adapter, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) in ((8, 6), (6, 8))]
    assert {leaf.dtype for leaf in kept} <= {jnp.dtype(jnp.int8)}
