"""The README's five calls with optax, as a user with a type checker writes them: pyright accepts this file."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import optax

import jlora

Params = dict[str, jax.Array]


def model(params: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


def train(params: Params, x: jax.Array, y: jax.Array, folder: str) -> tuple[Params, jlora.Adapter]:
    """Merged parameters after one step, and the adapter as it is read from disk."""
    sites: jlora.Sites = jlora.trace(model, params, x)
    adapter: jlora.Adapter = jlora.init(jax.random.key(0), sites, {"up|down": jlora.LoRA(rank=2)})
    apply = jlora.adapt(model)

    def loss(adapter: jlora.Adapter) -> jax.Array:
        return jnp.mean(jnp.square(apply(params, adapter, x) - y))

    tx = optax.adamw(1e-3)
    # optax types its trees as arrays in dictionaries and sequences; an adapter is a pytree of another class.
    tree = cast(optax.Params, adapter)
    gradients = jax.grad(loss)(adapter)
    updates, _ = tx.update(gradients, tx.init(tree), tree)
    adapter = cast(jlora.Adapter, optax.apply_updates(tree, updates))

    jlora.save(folder, adapter, params=params)
    merged: Params = jlora.merge(params, adapter)
    return merged, jlora.load(folder, params=params)
