"""DoRA: direction by LoRA, magnitude by a vector of its own."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import norms
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, switch
from jlora.methods._common.initializers import Initializer
from jlora.methods._common.networks import scale_axes
from jlora.methods.lora import LoRA


@final
@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """Trains the magnitude of each of a weight's columns separately from its direction.

        (|W| + m) (W + s A B) / |W + s A B|,    |.| the norm over the in axes,    m: (*stack, *out), zero at the start

    m is the change of the magnitude since the start. The norm in the denominator counts as a constant in the gradient
    (section 4.3 of the paper), and is computed as |W|^2 + 2 <W, s A B> + |s A B|^2, without the product A B.

    Arguments:
        rank, alpha, rank_stabilized, dropout, a_init, b_init: as for `LoRA`.

    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)
    a_init: Initializer | None = None
    b_init: Initializer | None = None

    factors = {**LoRA.factors, "m": "*stack *out"}
    depends_on_weight = True
    is_multiplicative = True

    @property
    def direction(self) -> LoRA:
        """The LoRA that changes the direction."""
        return LoRA(self.rank, self.alpha, self.rank_stabilized, self.dropout, self.a_init, self.b_init)

    def unsupported_reason(self, site: Site) -> str:
        return self.direction.unsupported_reason(site)

    def without_init_fields(self) -> "DoRA":
        return dataclasses.replace(self, a_init=None, b_init=None)

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        start = jnp.zeros((*site.sizes("stack"), *site.sizes("out")), dtype)
        return {**self.direction.init(key, site, dtype, base), "m": start}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        moved = self.direction.lower(update, w)
        before, after = (lax.stop_gradient(norms.norm(weight, update, "*stack *out")) for weight in (w, moved))
        m = update["m"].astype(before.dtype) * jnp.asarray(update.scale, before.dtype)
        return scale_axes(moved, update, (before + m) / after, "*stack *out")
