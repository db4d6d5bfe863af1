"""A Pallas kernel whose weight is adapted factored: the kernel computes the base product, a plain twin the update.

The kernel runs in Pallas' interpreter here, so that the example needs no accelerator.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

import jlora
from jlora import extend


def _kernel(x_ref, w_ref, out_ref) -> None:
    out_ref[...] = x_ref[...] @ w_ref[...]


@jax.custom_vjp
def _pallas_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(_kernel, out_shape=out, interpret=True)(x, w)


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _pallas_matmul(x, w), (x, w)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return _pallas_matmul(g, w.T), _pallas_matmul(x.T, g)


_pallas_matmul.defvjp(_forward, _backward)

matmul = extend.treat_as(_pallas_matmul, jnp.matmul)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"up": jax.random.normal(keys[0], (8, 16)) / 3, "down": jax.random.normal(keys[1], (16, 8)) / 4}
    x = jax.random.normal(keys[2], (4, 8))

    def model(params, x):
        return matmul(jnp.tanh(matmul(x, params["up"])), params["down"])

    adapter = jlora.init(keys[3], jlora.trace(model, params, x), jlora.LoRA(rank=2))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    print(jlora.explain(model, params, adapter, x))
    adapted = jax.jit(jlora.adapt(model, on_dense="error"))(params, adapter, x)
    assert jnp.allclose(adapted, model(jlora.merge(params, adapter), x), rtol=1e-4, atol=1e-4)
    print("adapted and merged agree")


if __name__ == "__main__":
    main()
