"""Inverses of small matrices against LAPACK's in float64, and their derivatives against differences."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jlora
from jlora.methods._common.linalg import inverse
from tests.support import compiled as report
from tests.support import toy_model

RNG = np.random.default_rng(0)


def turning(*shape: int) -> np.ndarray:
    q = RNG.normal(size=shape)
    return np.eye(shape[-1]) + q - q.swapaxes(-1, -2)


def gram(*shape: int) -> np.ndarray:
    q = RNG.normal(size=shape)
    return q @ q.swapaxes(-1, -2) + 0.1 * np.eye(shape[-1])


@pytest.mark.drawn(3)
@pytest.mark.parametrize("make", [turning, gram])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (7, 7), (64, 64), (5, 3, 3), (2, 3, 16, 16), (0, 4, 4)])
def test_values(make, shape):
    matrix = make(*shape)
    want = np.linalg.inv(matrix)
    got = jax.jit(inverse)(jnp.asarray(matrix, jnp.float32))
    condition = np.linalg.cond(matrix).max(initial=1)
    np.testing.assert_allclose(got, want, atol=1e-6 * condition * np.abs(want).max(initial=0))


def test_derivatives():
    check_grads(inverse, (jnp.asarray(turning(3, 4, 4), jnp.float32),), order=2, rtol=2e-2)


def calls_lapack(function, *args) -> bool:
    """Two calls on many matrices at a time wait for each other for ever, by jaxlib 0.10 on two cores."""
    return 'custom_call_target="lapack' in report.text(jax.jit(function).lower(*args).compile())


@pytest.mark.parametrize("method", [jlora.OFT(4), jlora.BOFT(4, 2)], ids=["oft", "boft"])
def test_rotations_call_no_lapack(method):
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), toy_model.sites(), {"layers/up": method}))
    adapter = toy_model.nonzero(shapes)

    def loss(adapter):
        return toy_model.loss(jlora.adapt(toy_model.model)(toy_model.params(), adapter, toy_model.tokens()))

    assert not calls_lapack(jax.grad(loss), adapter)


def test_scaled_gradients_call_no_lapack():
    adapter = toy_model.adapter(jlora.LoRA(3))
    assert not calls_lapack(lambda g, p: jlora.riemannian().update(g, (), p), adapter, adapter)
    assert calls_lapack(jnp.linalg.inv, jnp.eye(3))


@pytest.mark.drawn(3)
@pytest.mark.parametrize("start", ["orthogonal", "olora", "pissa_niter_2"])
def test_starts_of_several_stacks_end(start):
    """So do QR decompositions of whole stacks, which is why they are taken one by one there."""
    program = f"""
import jax, jlora
params = {{name: jax.numpy.ones((256, 64, 64)) for name in "abcd"}}
def model(params, x):
    return jax.lax.scan(lambda x, p: (sum(x @ w for w in p.values()), None), x, params)
sites = jlora.trace(model, params, params["a"][0])
targets = jlora.LoRA(48, start={start!r})
jax.block_until_ready(jax.jit(lambda p: jlora.init(jax.random.key(0), sites, targets, params=p))(params))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=os.environ | {"XLA_FLAGS": ""})
