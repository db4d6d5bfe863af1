"""How the two matrices of a low-rank update start, from numbers at random or from the weight itself."""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora._compat import one_by_one

FROM_BASE = r"pissa|pissa_niter_\d+|milora|olora"
STARTS = rf"gaussian|orthogonal|{FROM_BASE}"

kaiming = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # a = sqrt(5): +-1 / sqrt(fan in)
zeros = jax.nn.initializers.zeros
normal = jax.nn.initializers.normal

_qr = jnp.vectorize(one_by_one(lambda w: tuple(jnp.linalg.qr(w))), signature="(m,n)->(m,k),(k,n)")


def stacked(
    init: Callable[..., jax.Array], key: jax.Array, stack: tuple[int, ...], shape: tuple[int, ...], dtype: object
) -> Float[Array, "*stack_and_shape"]:
    """An initialiser's arrays, one with a key of its own for each layer of a stack."""
    if not stack:
        return init(key, shape, dtype)
    keys = jax.random.split(key, math.prod(stack))
    return jax.vmap(lambda k: init(k, shape, dtype))(keys).reshape(*stack, *shape)


def pair(
    start: str, key: jax.Array, weight: Float[Array, "*stack m n"] | None, shape: tuple[int, ...], rank: int
) -> tuple[Float[Array, "*stack m {rank}"], Float[Array, "*stack {rank} n"]]:
    """A and B for a named start; `shape` is `(*stack, in, out)`.

    gaussian: A ~ N(0, 1/rank^2), B zero. orthogonal: A B = 0 with neither zero. pissa: the leading singular vectors
    (Meng et al. 2024, arXiv:2404.02948), `pissa_niter_k` by k subspace iterations (Halko et al. 2011,
    arXiv:0909.4061). milora: the last ones (Wang et al. 2024, arXiv:2406.09044). olora: the first columns of the
    transposed weight's QR factors (Buyukakyuz 2024, arXiv:2406.01775).
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
    cut = slice(-rank, None) if start == "milora" else slice(0, rank)
    root = jnp.sqrt(s[..., cut])
    return u[..., cut] * root[..., None, :], root[..., None] * vt[..., cut, :]


def _orthogonal(key: jax.Array, stack: tuple[int, ...], m: int, n: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """A in the span of half of an orthogonal basis of the ranks, B in that of the other half."""
    a_key, b_key, q_key = jax.random.split(key, 3)
    half = (rank + 1) // 2
    q = stacked(_turn, q_key, stack, (rank, rank), jnp.float32)
    a = stacked(normal(0.1), a_key, stack, (m, half), jnp.float32)
    b = stacked(normal(0.1), b_key, stack, (rank - half, n), jnp.float32)
    return a @ q[..., :half, :], q[..., half:, :].mT @ b


def _turn(key: jax.Array, shape: tuple[int, ...], dtype: object) -> jax.Array:
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
