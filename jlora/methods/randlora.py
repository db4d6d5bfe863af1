"""RandLoRA: a sum of random low-rank matrices, each scaled by trained vectors, of full rank."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import random_matrices
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import integer, nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_matrix


def _reciprocal_size(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.full(shape, 1 / max(shape), dtype)


@final
@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """Adds a sum of products of frozen random matrices, scaled by trained vectors: a dense update of full rank.

        W + s sum_k A_k diag(d_k) B_k diag(b_k),    k = 1 ... ceil(min(in, out) / rank)

    with A_k: (larger, rank), B_k: (rank, smaller), d_k: rank numbers, b_k: as many as the smaller side, for a weight
    whose in side is the larger one; for other weights the product is transposed. The random matrices are drawn from the
    seed, and all weights share them. d starts at zero.

    Arguments:
        rank: of each term: the smaller it is, the more terms, and the more parameters.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1.
        seed: of the random matrices.

    Albert et al. 2025, RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models, arXiv:2502.00987.
    """

    rank: int = positive_integer(32)
    alpha: float | None = nonzero(None)
    seed: int = integer(0)

    factors = {"d": "*stack terms rank", "b": "*stack terms smaller"}
    initializers = {"d": zeros, "b": _reciprocal_size}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        smaller = min(axes.count("*in"), axes.count("*out"))
        return {"smaller": smaller, "terms": -(-smaller // self.rank)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        smaller, larger = sorted((n_in, n_out))
        count = self.sizes(update.axes)["terms"]
        a_key, b_key = random_matrices.keys(self.seed, 2)
        a = random_matrices.rows(a_key, larger, count * self.rank)
        b = random_matrices.rows(b_key, count * self.rank, smaller).reshape(count, self.rank, smaller)
        d, columns = update["d"][..., None].astype(b.dtype), update["b"][..., None, :].astype(b.dtype)
        scaled = d * columns * jnp.expand_dims(b, list(range(d.ndim - b.ndim)))
        delta = jnp.matmul(a, scaled.reshape(*scaled.shape[:-3], -1, smaller), precision=jax.lax.Precision.HIGHEST)
        return add_matrix(w, update, delta if n_in >= n_out else delta.mT, self.scale * update.scale)
