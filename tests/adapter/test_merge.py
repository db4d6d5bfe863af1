"""Merging: in float32, rounded once, and out again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.agreement import close


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounded_once(dtype):
    params = jax.tree.map(lambda a: a.astype(dtype), toy_model.params())
    adapter = toy_model.adapter()
    merged = jlora.merge(params, adapter)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), merged) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    u = adapter["mix/kernel"].factors
    exact = np.asarray(params["mix"]["kernel"], np.float64) + 1.5 * np.asarray(u["a"], np.float64) @ np.asarray(u["b"])
    got = np.asarray(merged["mix"]["kernel"], np.float64)
    half_ulp = 0.5 * float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(np.abs(exact)))
    assert (np.abs(got - exact) <= 1.01 * half_ulp + 1e-6).all()


def test_unmerge_takes_it_out():
    params, adapter = toy_model.params(), toy_model.adapter()
    close(jlora.unmerge(jlora.merge(params, adapter), adapter), params, 1e-6)


def test_untouched_leaves_are_the_same_objects():
    params = toy_model.params()
    merged = jlora.merge(params, toy_model.adapter())
    assert merged["mix"]["bias"] is params["mix"]["bias"]


def test_donated_buffers_are_gone():
    params = jax.tree.map(jnp.copy, toy_model.params())
    want = jlora.merge(toy_model.params(), toy_model.adapter())
    merged = jlora.merge(params, toy_model.adapter(), donate=True)
    close(merged, want, 1e-7)
    assert params["mix"]["kernel"].is_deleted()
    assert not params["mix"]["bias"].is_deleted()


def test_merge_inside_jit_and_grad():
    params, adapter = toy_model.params(), toy_model.adapter()
    close(jax.jit(jlora.merge)(params, adapter), jlora.merge(params, adapter), 1e-6)
    grads = jax.grad(lambda a: jlora.merge(params, a)["mix"]["kernel"].sum())(adapter)
    u = adapter["mix/kernel"].factors
    close(grads["mix/kernel"].factors["a"], 1.5 * jnp.broadcast_to(u["b"].sum(1)[None], u["a"].shape))


def test_scale():
    params, adapter = toy_model.params(), toy_model.adapter()
    close(jlora.merge(params, jlora.scale(adapter, 0.0)), params, 0)
    half = jlora.merge(params, jlora.scale(adapter, 0.5))
    close(half, jax.tree.map(lambda a, b: (a + b) / 2, params, jlora.merge(params, adapter)))
    close(
        jlora.adapt(toy_model.model)(params, jlora.scale(adapter, 0.5), toy_model.tokens()),
        toy_model.model(half, toy_model.tokens()),
    )
