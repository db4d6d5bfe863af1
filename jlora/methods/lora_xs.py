"""LoRA-XS: a small matrix between the leading singular vectors of the weight."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora.methods._base import Method
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of
from jlora.methods._common.matrices import as_matrix, rank_too_high


@final
@dataclasses.dataclass(frozen=True)
class LoRAXS(Method):
    """Trains a rank x rank matrix between the weight's frozen leading singular vectors.

        W + s A R B,    A = U S: (*stack, *in, rank),    R: (*stack, rank, rank),    B = V^T: (*stack, rank, *out)

    with s = alpha / rank. R starts at zero. A and B come from the weight: `jlora.init(..., params=params)`.

    Arguments:
        rank: the number of singular vectors.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Balazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv:2405.17604.
    """

    rank: int = positive_integer(16)
    alpha: float | None = nonzero(None)
    dropout: float = fraction(0.0)

    factors = {"a": "*stack *in in_rank", "r": "*stack in_rank out_rank", "b": "*stack out_rank *out"}
    networks = ("a r b",)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a", "b")

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"in_rank": self.rank, "out_rank": self.rank}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        u, s, vt = jnp.linalg.svd(as_matrix(base, site.roles), full_matrices=False)
        a = u[..., : self.rank] * s[..., None, : self.rank]
        return {
            "a": a.astype(dtype),
            "r": jnp.zeros((*site.sizes("stack"), self.rank, self.rank), dtype),
            "b": vt[..., : self.rank, :].astype(dtype),
        }
