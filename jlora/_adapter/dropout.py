"""Dropout of the low-rank branch as data: keys that travel in the adapter."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jlora._tree.paths import path_number
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single


def with_dropout(adapter: Adapter, key: jax.Array) -> Adapter:
    """Gives every update whose method has dropout a key of its own; call it inside the loss.

        W x + s B A (m * x) / (1 - dropout),    m: Bernoulli(1 - dropout), drawn from the key

    Keys are folded from the paths; a stacked weight has one a layer, and each use of a weight and each step of a loop
    folds its own number in, so no two masks are the same, but those of the devices
    in a `shard_map` that the program has. Without this call nothing is dropped.

    Arguments:
        adapter: the adapter.
        key: a PRNG key, new for every training step.

    Returns:
        an adapter of the same factors. Its key leaves cannot be differentiated, so call this inside the function that
        `jax.grad` is applied to.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return {
        path: _keyed(update, jax.random.fold_in(key, path_number(path))) if update.method.dropout else update
        for path, update in as_single(adapter).items()
    }


def _keyed(update: Update, key: jax.Array) -> Update:
    stack = tuple(n for n, role in zip(update.shape, update.roles, strict=True) if role == "stack")
    keys = jax.random.split(key, math.prod(stack)).reshape(stack) if stack else key
    return dataclasses.replace(update, key=keys)
