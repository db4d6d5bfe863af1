"""Random numbers that are drawn from a seed wherever they are needed, and never kept."""

import jax
import jax.numpy as jnp
import numpy as np


def keys(seed: int, count: int) -> jax.Array:
    """Keys of one generator, whatever the default is."""
    return jax.random.split(jax.random.key(seed, impl="threefry2x32"), count)


def rows(key: jax.Array, count: int, width: int) -> jax.Array:
    """Uniform numbers in +-1, a key a row: the first rows are the same for every count."""
    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(count))
    return jax.vmap(lambda k: jax.random.uniform(k, (width,), minval=-1, maxval=1))(keys)


def scattered(values: jax.Array, seed: int, n_in: int, n_out: int) -> jax.Array:
    """A matrix `(*stack, in, out)` of zeros with one value at random in each of as many equal stretches of it."""
    count, total = values.shape[-1], n_in * n_out
    borders = np.arange(count + 1, dtype=np.int64) * total // count
    length = jnp.asarray(np.diff(borders), jnp.int32)
    at = jax.random.randint(keys(seed, 1)[0], (count,), 0, length)
    places = jnp.asarray(borders[:-1], jnp.int32) + at
    flat = jnp.zeros((*values.shape[:-1], total), values.dtype)
    flat = flat.at[..., places].set(values, unique_indices=True, indices_are_sorted=True)
    return flat.reshape(*values.shape[:-1], n_in, n_out)
