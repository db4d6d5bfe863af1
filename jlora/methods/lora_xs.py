"""LoRA-XS: a small matrix between the leading singular vectors of the weight."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check


@final
@dataclasses.dataclass(frozen=True)
class LoRAXS(Method):
    """Trains a rank x rank matrix between the weight's frozen leading singular vectors.

        W + s A R B,    A = U S: (*stack, *in, rank),    R: (*stack, rank, rank),    B = V^T: (*stack, rank, *out)

    with s = alpha / rank. R starts at zero. A and B come from the weight: `jlora.init(..., params=params)`.

    Arguments:
        rank: the number of singular vectors.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Balazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv:2405.17604.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a", "b")

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.rank_above(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        u, s, vt = jnp.linalg.svd(_axes.as_matrix(base, site.roles), full_matrices=False)
        a = u[..., : self.rank] * s[..., None, : self.rank]
        return {
            "a": a.reshape(*stack, *inner, self.rank).astype(dtype),
            "r": jnp.zeros((*stack, self.rank, self.rank), dtype),
            "b": vt[..., : self.rank, :].reshape(*stack, self.rank, *outer).astype(dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        one, two = _axes.ranks(w, 2)
        pairs = [
            (update["a"], stack + inner + one),
            (update["r"], stack + one + two),
            (update["b"], stack + two + outer),
        ]
        scale = _check.scale(self.alpha, self.rank, False) * update.scale
        return _axes.add(w, pairs, {one: self.rank, two: self.rank}, scale, **_axes.dropout(update, stack))
