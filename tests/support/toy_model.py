"""A small program with a matrix, a bias, a stacked kernel and a tied embedding, for tests of everything around it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

VOCABULARY, WIDTH, HIDDEN, LAYERS = 11, 8, 12, 3


def params() -> dict:
    """Random parameters, no two alike."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)

    return {
        "embed": normal(VOCABULARY, WIDTH),
        "layers": {
            "up": normal(LAYERS, WIDTH, HIDDEN),
            "down": normal(LAYERS, HIDDEN, WIDTH),
            "bias": normal(LAYERS, WIDTH),
        },
        "mix": {"kernel": normal(WIDTH, WIDTH), "bias": normal(WIDTH)},
    }


def tokens() -> jax.Array:
    return jnp.arange(10).reshape(2, 5) % VOCABULARY


def model(p: dict, ids: jax.Array) -> jax.Array:
    """Embedding, a scan of blocks, a mixing layer, and the embedding again as the head."""

    def block(x: jax.Array, layer: dict) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"] + layer["bias"][None, None], None

    x, _ = jax.lax.scan(block, p["embed"][ids], p["layers"])
    x = jnp.tanh(x @ p["mix"]["kernel"] + p["mix"]["bias"][None, None])
    return x @ p["embed"].T


@functools.cache
def sites() -> jlora.Sites:
    return jlora.trace(model, params(), tokens())


def adapter(method: jlora.Method | None = None, seed: int = 3) -> dict:
    """An adapter of every weight that a product uses, all its factors non-zero."""
    method = jlora.LoRA(rank=2, alpha=3.0) if method is None else method
    return random_adapter(sites(), method, seed)


def random_adapter(of: jlora.Sites, targets: Any, seed: int = 3, **options: Any) -> dict:
    """An adapter as `jlora.init` makes it of sites, with random numbers in every array."""
    return nonzero(jax.eval_shape(lambda: jlora.init(jax.random.key(0), of, targets, **options)), seed)


def nonzero(tree: dict, seed: int = 3) -> dict:
    """The same tree with random numbers in every array."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), tree)


def loss(y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(y))
