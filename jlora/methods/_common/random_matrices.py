"""Random numbers that are generated from a seed in every use, and not stored.

They are the same under all settings of JAX, because adapters outlive the program that trained them.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DRAWN_AT_ONCE = 2**20  # numbers

P = ParamSpec("P")
T = TypeVar("T")


def drawn_alike(fun: Callable[P, T]) -> Callable[P, T]:
    """A function that draws the same numbers whether `jax_threefry_partitionable` is set or not."""

    @functools.wraps(fun)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.threefry_partitionable(True):
            return fun(*args, **kwargs)

    return run


@drawn_alike
def keys(seed: int, count: int) -> jax.Array:
    """Keys of the generator threefry2x32, also if the default generator is another one."""
    # The data of `jax.random.key(seed)`, unless 64 bits or an offset of seeds are set.
    data = jnp.asarray(np.array([0, seed % 2**32], np.uint32))
    return jax.random.split(jax.random.wrap_key_data(data, impl="threefry2x32"), count)


@drawn_alike
def integers(key: jax.Array, shape: tuple[int, ...], limit: jax.Array | int) -> jax.Array:
    """Random integers of 32 bits from 0 to below a limit: JAX draws others of 64 bits, if these are enabled."""
    return jax.random.randint(key, shape, 0, limit, jnp.int32)


@drawn_alike
def rows(key: jax.Array, count: int, width: int) -> jax.Array:
    """Uniform numbers in [-1, 1), `(count, width)`. Each row has its own key, so it does not depend on `count`.

    They equal those of `jax.random.uniform`. Large matrices are drawn some rows at a time: the integers that they come
    from, four times as large as the matrix, are in memory for these rows alone.
    """

    def row(key: jax.Array) -> jax.Array:
        bits = jax.random.bits(key, (width,), jnp.uint32)
        fractions = lax.bitcast_convert_type(bits >> 9 | 0x3F800000, jnp.float32)  # in [1, 2), of 23 bits
        return 2 * fractions - 3

    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(count))
    at_once = max(_DRAWN_AT_ONCE // width, 1)
    return jax.vmap(row)(keys) if count <= at_once else lax.map(row, keys, batch_size=at_once)


def scattered_positions(count: int, seed: int, total: int) -> jax.Array:
    """Distinct positions below `total`, sorted: it is divided into `count` equal ranges, with one position in each.

    Arguments:
        count: how many.
        seed: of the random positions inside the ranges.
        total: their limit.
    """
    return scattered(keys(seed, 1)[0], count, total)


def scattered(key: jax.Array, count: int, total: int) -> jax.Array:
    """The same positions from a key."""
    borders = np.arange(count + 1, dtype=np.int64) * total // max(count, 1)
    length = jnp.asarray(np.diff(borders), jnp.int32)
    return jnp.asarray(borders[:-1], jnp.int32) + integers(key, (count,), length)
