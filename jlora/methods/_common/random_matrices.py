"""Random numbers that are generated from a seed in every use, and not stored."""

import jax
import jax.numpy as jnp
import numpy as np


def keys(seed: int, count: int) -> jax.Array:
    """Keys of the generator threefry2x32, also if the default generator is another one."""
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


def rows(key: jax.Array, count: int, width: int) -> jax.Array:
    """Uniform numbers in [-1, 1), `(count, width)`. Each row has its own key, so it does not depend on `count`."""
    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(count))
    return jax.vmap(lambda k: jax.random.uniform(k, (width,), minval=-1, maxval=1))(keys)


def scattered(values: jax.Array, seed: int, n_in: int, n_out: int) -> jax.Array:
    """A sparse matrix `(*stack, in, out)`: its entries are divided into equal ranges, and each range has one value.

    Arguments:
        values: the non-zero entries, (*stack, count).
        seed: of the random positions inside the ranges.
        n_in, n_out: the size of the matrix.
    """
    count, total = values.shape[-1], n_in * n_out
    borders = np.arange(count + 1, dtype=np.int64) * total // count
    length = jnp.asarray(np.diff(borders), jnp.int32)
    offsets = jax.random.randint(keys(seed, 1)[0], (count,), 0, length)
    positions = jnp.asarray(borders[:-1], jnp.int32) + offsets
    flat = jnp.zeros((*values.shape[:-1], total), values.dtype)
    flat = flat.at[..., positions].set(values, unique_indices=True, indices_are_sorted=True)
    return flat.reshape(*values.shape[:-1], n_in, n_out)
