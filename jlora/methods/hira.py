"""HiRA: the weight times a low-rank matrix, elementwise."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.hyperparameters import nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.matrices import dense_matrix, rank_too_high
from jlora.methods._common.networks import add_matrix


@final
@dataclasses.dataclass(frozen=True)
class HiRA(Method):
    """Adds the elementwise product of the weight and a low-rank matrix: a dense update of any rank.

        W + s W * (A B),    A: (*stack, *in, rank),    B: (*stack, rank, *out), zero at the start,    s = alpha / rank

    Arguments:
        rank: of the product A B.
        alpha: the numerator of the scale; None makes the scale 1.

    Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR 2025.
    """

    rank: int = positive_integer(32)
    alpha: float | None = nonzero(None)

    factors = {"a": "*stack *in rank", "b": "*stack rank *out"}
    initializers = {"a": kaiming, "b": zeros}
    depends_on_weight = True

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        product = jnp.matmul(update.joined("a"), update.joined("b"), precision=jax.lax.Precision.HIGHEST)
        base = dense_matrix(w, update.roles)
        return add_matrix(w, update, base * product.astype(base.dtype), self.scale * update.scale)
