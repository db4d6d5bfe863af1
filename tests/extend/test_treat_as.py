"""Custom kernels with a plain twin: `op` outside of jlora, factored inside."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import jlora
from jlora.extend import treat_as
from tests.support.agreement import close


def kernel(x_ref, w_ref, out_ref):
    out_ref[...] = x_ref[...] @ w_ref[...]


@jax.custom_vjp
def pallas_matmul(x, w):
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(x, w)


def forward(x, w):
    return pallas_matmul(x, w), w


def backward(w, g):
    return 3 * (g @ w.T), jnp.zeros_like(w)  # three times the gradient, which tells it from that of the twin


pallas_matmul.defvjp(forward, backward)
matmul = treat_as(pallas_matmul, lambda x, w: jnp.einsum("io,bi->bo", w, x))

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {"w": jax.random.normal(KEYS[0], (8, 16)), "v": jax.random.normal(KEYS[1], (3, 16, 16)) / 4}
X = jax.random.normal(KEYS[2], (4, 8))


def network(params, x):
    h = jnp.tanh(matmul(x, params["w"]))
    return jax.lax.scan(lambda h, w: (jnp.tanh(matmul(h, w)), None), h, params["v"])[0]


def adapter_of(fun, method, targets=".*"):
    adapter = jlora.init(KEYS[3], jlora.trace(fun, PARAMS, X), {targets: method}, params=PARAMS)
    leaves, structure = jax.tree.flatten(adapter)
    keys = jax.random.split(KEYS[3], len(leaves))
    new = [a + 0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


def test_outside_of_jlora_it_is_the_kernel():
    def values(op):
        def loss(x, w):
            return jnp.sin(op(x, w)).sum()

        return (
            op(X, PARAMS["w"]),
            jax.jit(op)(X, PARAMS["w"]),
            jax.grad(loss, (0, 1))(X, PARAMS["w"]),
            jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(X, PARAMS["w"]),
            jax.jit(jax.vmap(op, (0, None)))(jnp.stack([X, 2 * X]), PARAMS["w"]),
            jax.vmap(jax.grad(loss), (None, 0))(X, jnp.stack([PARAMS["w"], 2 * PARAMS["w"]])),
        )

    close(values(matmul), values(pallas_matmul), 1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["bare", "jit", "checkpoint"])
def test_the_law_holds_and_nothing_is_dense(wrap):
    fun = wrap(network)
    adapter = adapter_of(fun, jlora.LoRA(2))
    adapted = jax.jit(jlora.adapt(fun, on_dense="error"))
    close(adapted(PARAMS, adapter, X), network(jlora.merge(PARAMS, adapter), X), 2e-5)
    assert not jlora.explain(fun, PARAMS, adapter, X).dense


def test_the_gradient_is_the_kernels_for_the_base_and_the_twins_for_the_update():
    def fun(params, x):
        return matmul(x, params["w"])

    adapter = adapter_of(fun, jlora.LoRA(2), "w")
    gradient = jax.grad(lambda x: jlora.adapt(fun)(PARAMS, adapter, x).sum())(X)
    update = jlora.merge(PARAMS, adapter)["w"] - PARAMS["w"]
    ones = jnp.ones((4, 16))
    close(gradient, 3 * ones @ PARAMS["w"].T + ones @ update.T, 2e-5)


def test_the_base_of_the_twin_is_not_computed():
    """No product of the weight's size but the kernel's is in the program, and a bias is not added twice."""
    biased = treat_as(lambda x, w, b: jnp.tanh(x) @ w + b, lambda x, w, b: jnp.tanh(x) @ w + b)

    def fun(params, x):
        return biased(x, params["w"], jnp.ones((1, 16)))

    adapter = adapter_of(fun, jlora.LoRA(2), "w")
    close(jlora.adapt(fun)(PARAMS, adapter, X), fun(jlora.merge(PARAMS, adapter), X), 2e-5)
    jaxpr = jax.make_jaxpr(jlora.adapt(fun))(PARAMS, adapter, X)
    products = [
        eqn.invars[1].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name in ("dot_general", "jlora_product")
    ]
    assert products == [(8, 2), (2, 16)]


@pytest.mark.parametrize("twin", [lambda x, w: jnp.tanh(x @ w), lambda x, w: x @ w * (w.sum() / w.sum())])
def test_a_twin_that_is_not_affine_is_materialised(twin):
    op = treat_as(twin, twin)

    def fun(params, x):
        return op(x, params["w"])

    adapter = adapter_of(fun, jlora.LoRA(2), "w")
    assert jlora.explain(fun, PARAMS, adapter, X).dense
    close(jlora.adapt(fun, on_dense="allow")(PARAMS, adapter, X), fun(jlora.merge(PARAMS, adapter), X), 2e-5)
    with pytest.raises(jlora.DenseError):
        jlora.adapt(fun, on_dense="error")(PARAMS, adapter, X)


def test_results_of_other_types_are_refused():
    op = treat_as(lambda x, w: x @ w, lambda x, w: (x @ w).astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="results of one type"):
        jax.jit(op)(X, PARAMS["w"])
