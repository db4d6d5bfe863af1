"""Initial values of factors: random numbers, or two matrices that are computed from the weight."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._compat import one_by_one

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # of a key, a shape and a dtype

FROM_BASE = r"pissa|pissa_niter_\d+|milora|olora"
STARTS = rf"gaussian|orthogonal|mica|{FROM_BASE}"

kaiming = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # a = sqrt(5): +-1 / sqrt(fan in)
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones
constant = jax.nn.initializers.constant
normal = jax.nn.initializers.normal

_qr = jnp.vectorize(one_by_one(lambda w: tuple(jnp.linalg.qr(w))), signature="(m,n)->(m,k),(k,n)")


def uniform_within(bound: float) -> Initializer:
    """Uniform numbers in +-bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def kaiming_of_outputs(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """B as A starts, with out and in exchanged: uniform in +-1/sqrt(out)."""
    return kaiming(key, shape[::-1], dtype).T


def stacked(
    initializer: Initializer, key: jax.Array, stack: tuple[int, ...], shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    """An array `(*stack, *shape)`; the initialiser is called for each layer of the stack with its own key."""
    if not stack:
        return initializer(key, shape, dtype)
    keys = jax.random.split(key, math.prod(stack))
    return jax.vmap(lambda k: initializer(k, shape, dtype))(keys).reshape(*stack, *shape)


def named_start(
    start: str, key: jax.Array, weight: jax.Array | None, shape: tuple[int, ...], rank: int
) -> tuple[jax.Array, jax.Array]:
    """A `(*stack, in, rank)` and B `(*stack, rank, out)` for a named start; weight and `shape` are `(*stack, in, out)`.

    gaussian: A ~ N(0, 1/rank^2), B zero. orthogonal: A B = 0, A and B non-zero. pissa: the leading singular vectors
    (Meng et al. 2024, arXiv:2404.02948), `pissa_niter_k` by k subspace iterations (Halko et al. 2011,
    arXiv:0909.4061). milora: the last ones (Wang et al. 2024, arXiv:2406.09044). mica: A zero, and B the last right
    ones (Rüdiger and Raschka 2026, arXiv:2604.01694). olora: the first columns of the transposed weight's QR factors
    (Buyukakyuz 2024, arXiv:2406.01775).
    """
    *stack, m, n = shape
    if start == "gaussian":
        a = stacked(normal(1 / rank), key, tuple(stack), (m, rank), jnp.float32)
        return a, jnp.zeros((*stack, rank, n))
    if start == "orthogonal":
        return _orthogonal(key, tuple(stack), m, n, rank)
    assert weight is not None
    if start == "olora":
        q, r = _qr(weight.mT)
        return r[..., :rank, :].mT, q[..., :rank].mT
    if iterations := re.fullmatch(r"pissa_niter_(\d+)", start):
        u, s, vt = _randomised_svd(key, weight, rank, int(iterations[1]))
    else:
        u, s, vt = jnp.linalg.svd(weight, full_matrices=False)
    if start == "mica":
        return jnp.zeros((*stack, m, rank)), vt[..., -rank:, :]
    cut = slice(-rank, None) if start == "milora" else slice(0, rank)
    root = jnp.sqrt(s[..., cut])
    return u[..., cut] * root[..., None, :], root[..., None] * vt[..., cut, :]


def _orthogonal(key: jax.Array, stack: tuple[int, ...], m: int, n: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """A in the span of half of an orthogonal basis of the ranks, B in that of the other half."""
    a_key, b_key, q_key = jax.random.split(key, 3)
    half = (rank + 1) // 2
    q = stacked(_orthogonal_matrix, q_key, stack, (rank, rank), jnp.float32)
    a = stacked(normal(0.1), a_key, stack, (m, half), jnp.float32)
    b = stacked(normal(0.1), b_key, stack, (rank - half, n), jnp.float32)
    return a @ q[..., :half, :], q[..., half:, :].mT @ b


def _orthogonal_matrix(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """A random orthogonal matrix."""
    return one_by_one(lambda k: jax.nn.initializers.orthogonal()(k, shape, dtype))(key)


def _randomised_svd(
    key: jax.Array, weight: jax.Array, rank: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The leading singular values by subspace iteration on a random block, oversampled by 10."""
    width = min(rank + 10, *weight.shape[-2:])
    q = jax.random.normal(key, (*weight.shape[:-2], weight.shape[-1], width), weight.dtype)
    for _ in range(iterations + 1):
        q, _ = _qr(weight @ q)
        q, _ = _qr(weight.mT @ q)
    y, _ = _qr(weight @ q)
    u, s, vt = jnp.linalg.svd(y.mT @ weight, full_matrices=False)
    return y @ u, s, vt
