"""Whole numbers as arrays of digits, which every floating-point dtype holds exactly: for arrays that adapters hold.

An adapter has no arrays of integers, because `jax.grad` refuses them.
"""

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 256


def count_digits(length: int) -> int:
    """How many digits an index into an array takes."""
    return 1 if length <= _BASE else 1 + count_digits(-(-length // _BASE))


def to_digits(numbers: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers as digits along a last axis, the most significant one first."""
    return np.stack([numbers // _BASE**place % _BASE for place in reversed(range(count))], axis=-1).astype(np.float32)


def traced_digits(numbers: jax.Array, count: int) -> jax.Array:
    """The same of traced numbers."""
    return jnp.stack([numbers // _BASE**place % _BASE for place in reversed(range(count))], axis=-1).astype(jnp.float32)


def from_digits(digits: jax.Array | np.ndarray) -> jax.Array:
    """The inverse of `to_digits`."""
    numbers = jnp.zeros(digits.shape[:-1], jnp.int32)
    for place in range(digits.shape[-1]):
        numbers = numbers * _BASE + digits[..., place].astype(jnp.int32)
    return numbers
