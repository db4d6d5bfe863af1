"""LoRA-GA: factors from the singular vectors of the gradient of the whole weight, which is never computed."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter.starts.pairs import check, with_pair
from jlora._tree.paths import path_number
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single
from jlora.methods.lora import LoRA

Gradient = Callable[[Adapter], Adapter]
Matrices = dict[str, np.ndarray]


def lora_ga(key: jax.Array, adapter: Adapter, gradient: Gradient, *, passes: int = 6, gamma: float = 16.0) -> Adapter:
    """Initialises LoRA with leading singular vectors of the loss's gradient with respect to each whole weight.

        G ~ U S V^T,    A = c [u_1 ... u_r],    B = c [v_{r+1} ... v_{2r}]^T,    c = out^(1/4) / sqrt(gamma)

    So the first step changes the weight along the leading directions of the gradient, as full fine-tuning does. The
    initial product A B is subtracted, and the base is not changed: at the start the program equals the base.

    G is not computed. With A = 0 and B = P the adapter's own gradient is G P^T, with A = Q and B = 0 it is Q^T G:
    products of G with thin matrices, which a randomised decomposition (Halko et al. 2011, arXiv:0909.4061) needs.

    Arguments:
        key: a PRNG key.
        adapter: from `jlora.init`, of LoRA; its factors are replaced. A weight needs in and out sizes of at least twice
            the rank.
        gradient: the gradient of the loss with respect to an adapter of any rank. It is called `passes` times, and must
            use the same data each time; for several batches it returns their mean.
        passes: the number of gradients, even; 2 is one pass on either side, and each further pair a power iteration.
        gamma: the paper's constant, which makes the initial factors small.

    Returns:
        the adapter. The thin matrices are decomposed in float64 on the host.

    Raises:
        TypeError: if `adapter` is not an adapter, or `gradient` does not return one.
        ValueError: if a method is not LoRA, a rank is too high, `passes` is not an even number, or a gradient is not
            finite, or zero everywhere.

    Example:
        gradient = jax.jit(jax.grad(loss))
        adapter = jlora.lora_ga(key, adapter, lambda adapter: gradient(adapter, params, batch))

    Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv:2407.05000.
    """
    if passes < 2 or passes % 2:
        raise ValueError(f"LoRA-GA takes an even number of passes, at least 2, not {passes}.")
    if not gamma > 0:
        raise ValueError(f"LoRA-GA's gamma is a positive number, not {gamma}.")
    updates = as_single(adapter)
    ranks = {path: _rank(path, update) for path, update in updates.items()}
    right = {path: _orthonormal(_random(key, path, update)) for path, update in updates.items()}
    left: Matrices = {}
    products: Matrices = {}
    for _ in range(passes // 2):
        left = {path: _orthonormal(y) for path, y in _products(updates, gradient, right, "a").items()}
        products = _products(updates, gradient, left, "b")
        right = {path: _orthonormal(y.swapaxes(-1, -2)) for path, y in products.items()}
    out = {}
    for path, update in updates.items():
        u, _, vt = np.linalg.svd(products[path], full_matrices=False)
        r, c = ranks[path], update.axes.count("*out") ** 0.25 / math.sqrt(gamma)
        out[path] = with_pair(update, c * (left[path] @ u[..., :r]), c * vt[..., r : 2 * r, :], is_zero=False)
    return out


def _rank(path: str, update: Update) -> int:
    rank, largest = check(path, update, "LoRA-GA", is_zero=False).rank, _largest(update)
    if 2 * rank > largest:
        raise ValueError(
            f"{path}: LoRA-GA takes {2 * rank} singular vectors for rank {rank}, and the weight {update.shape} has "
            f"{largest}. Lower the rank to {largest // 2}, or leave the weight out."
        )
    return rank


def _largest(update: Update) -> int:
    return min(update.axes.count("*in"), update.axes.count("*out"))


def _random(key: jax.Array, path: str, update: Update) -> np.ndarray:
    """A random matrix `(*stack, out, width)`, of twice the rank and some more columns."""
    rank: int = update.method.rank  # pyright: ignore[reportAttributeAccessIssue]
    width = min(2 * rank + 10, _largest(update))
    shape = (*update.axes.sizes("*stack"), update.axes.count("*out"), width)
    return np.asarray(jax.random.normal(jax.random.fold_in(key, path_number(path)), shape))


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    return np.linalg.qr(columns)[0]


def _products(updates: Adapter, gradient: Gradient, matrices: Matrices, name: str) -> Matrices:
    """The products of the whole gradient G with matrices: `G P` for the factor a, and `Q^T G` for b."""
    probes = {}
    for path, update in updates.items():
        matrix, axes = matrices[path], update.axes
        method = LoRA(matrix.shape[-1], layers=update.method.layers)
        shapes, other = method.shapes(axes), "b" if name == "a" else "a"
        value = matrix.swapaxes(-1, -2) if other == "b" else matrix
        factors = {name: jnp.zeros(shapes[name]), other: jnp.asarray(value, jnp.float32).reshape(shapes[other])}
        probes[path] = Update({"a": factors["a"], "b": factors["b"]}, method, update.roles, update.shape)
    gradients = gradient(probes)
    if not isinstance(gradients, Mapping) or set(gradients) != set(probes):
        raise TypeError(
            "gradient returns the gradient with respect to the adapter that it gets, such as lambda adapter: "
            f"jax.grad(loss)(adapter, params, batch), and not {type(gradients).__name__}."
        )
    out = {path: np.asarray(gradients[path].joined(name), np.float64) for path in updates}
    for path, y in out.items():
        if not np.isfinite(y).all():
            raise ValueError(f"{path}: its gradient has entries that are infinite or not a number.")
        if not y.any():
            raise ValueError(
                f"{path}: its gradient is zero, so it has no directions to start with. Leave the weight out."
            )
    return out
