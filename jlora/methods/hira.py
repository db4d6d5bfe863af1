"""HiRA: the weight times a low-rank matrix, elementwise."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import initializers as _start


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

    rank: int = 32
    alpha: float | None = None

    depends_on_weight = True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.rank_above(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        a = _start.stacked(_start.kaiming, key, stack, (_axes.counts(site)[0], self.rank), dtype)
        return {
            "a": a.reshape(*stack, *inner, self.rank),
            "b": jnp.zeros((*stack, self.rank, *outer), dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack = [n for n, r in zip(update.shape, update.roles, strict=True) if r == "stack"]
        a, b = update["a"].reshape(*stack, -1, self.rank), update["b"].reshape(*stack, self.rank, -1)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        scale = _check.scale(self.alpha, self.rank, False) * update.scale
        whole = _axes.matrix(w, update.roles)
        return _axes.add_matrix(w, whole * product.astype(whole.dtype), update.roles, scale)
