"""RandLoRA: a sum of random low-rank matrices, each scaled by trained vectors, of full rank."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import random_matrices as _random


@final
@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """Adds a sum of products of frozen random matrices, scaled by trained vectors: a dense update of full rank.

        W + s sum_k A_k diag(d_k) B_k diag(b_k),    k = 1 ... ceil(min(in, out) / rank)

    with A_k: (larger, rank), B_k: (rank, smaller), d_k: rank numbers, b_k: as many as the smaller side, for a weight
    whose in side is the larger one; the other way round the product is transposed. The random matrices are drawn from
    the seed, and all weights share them. d starts at zero.

    Arguments:
        rank: of each term: the smaller it is, the more terms, and the more parameters.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1.
        seed: of the random matrices.

    Albert et al. 2025, RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models, arXiv:2502.00987.
    """

    rank: int = 32
    alpha: float | None = None
    seed: int = 0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.rank_above(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, small = site.sizes("stack"), min(_axes.counts(site))
        count = -(-small // self.rank)
        return {
            "d": jnp.zeros((*stack, count, self.rank), dtype),
            "b": jnp.full((*stack, count, small), 1 / max(count, small), dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        _, inner, outer = _axes.letters(w, update.roles)
        n_in, n_out = w.size(inner), w.size(outer)
        small, large = sorted((n_in, n_out))
        count = -(-small // self.rank)
        one, two = _random.keys(self.seed, 2)
        a = _random.rows(one, large, count * self.rank)
        b = _random.rows(two, count * self.rank, small).reshape(count, self.rank, small)
        d, columns = update["d"][..., None], update["b"][..., None, :]
        scaled = d * columns * jnp.expand_dims(b, list(range(d.ndim - b.ndim)))
        delta = jnp.matmul(a, scaled.reshape(*scaled.shape[:-3], -1, small), precision=jax.lax.Precision.HIGHEST)
        delta = delta if n_in >= n_out else delta.mT
        scale = _check.scale(self.alpha, self.rank, False) * update.scale
        return _axes.add_matrix(w, delta, update.roles, scale)
