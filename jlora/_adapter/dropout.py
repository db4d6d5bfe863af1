"""Dropout of the low-rank branch: its PRNG keys are leaves of the adapter."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jlora._tree.paths import path_number
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single


def with_dropout(adapter: Adapter, key: jax.Array) -> Adapter:
    """Gives every update whose method has dropout its own key; call it inside the loss.

        x W + s ((m * x) / (1 - dropout)) A B,    m: Bernoulli(1 - dropout), drawn from the key

    An update whose method draws from a distribution (MonteCLoRA) gets a key too: it is drawn with one, and at its mean
    without.

    Masks differ between paths, layers of a stack, uses of a weight and steps of a loop. Inside the program's own
    `shard_map` or `pmap` they also differ between devices with different inputs, and are equal on devices with the same
    input. If `adapt` itself is called inside `shard_map` or `pmap`, give each device its own key:
    `jax.random.fold_in(key, jax.lax.axis_index(name))`. Without this call no input is dropped.

    Arguments:
        adapter: the adapter.
        key: a PRNG key, new for every training step.

    Returns:
        the adapter with keys. `jax.grad` does not accept key leaves, so call this inside the function that is
        differentiated.

    Raises:
        TypeError: if `adapter` is not an adapter, or `key` is not a PRNG key.

    Example:
        def loss(adapter, params, x, y, key):
            prediction = jlora.adapt(apply)(params, jlora.with_dropout(adapter, key), x)
            return jnp.mean((prediction - y) ** 2)
    """
    updates = as_single(adapter)
    if not hasattr(key, "dtype"):
        raise TypeError(f"key must be a PRNG key, such as jax.random.key(0), not {type(key).__name__}.")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return {
        path: with_key(update, path, key) if update.method.is_random else update for path, update in updates.items()
    }


def with_key(update: Update, path: str, key: jax.Array) -> Update:
    """An update with the keys of its dropout.

    Arguments:
        update: the update.
        path: of its weight.
        key: a PRNG key, from which those of the layers of a stack are derived.
    """
    stack = update.axes.sizes("*stack")
    key = jax.random.fold_in(key, path_number(path))
    keys = jax.random.split(key, math.prod(stack)).reshape(stack) if stack else key
    return dataclasses.replace(update, key=keys)
