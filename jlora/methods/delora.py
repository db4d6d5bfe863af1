"""DeLoRA: normalised rank-one terms, and a bound for the size of the update."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax.numpy as jnp
from jax import lax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import norms
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer
from jlora.methods._common.initializers import Initializer, constant, kaiming, zeros
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class DeLoRA(Method):
    """Adds normalised rank-one terms: their directions and their common size are trained separately.

        W + diag(|W|) A diag(l / (rank |a_k| |b_k|)) B,    A: (*stack, *in, rank),    B: (*stack, rank, *out)

    |W| holds the norms of the weight's rows (over the out axes), |a_k| and |b_k| those of A's columns and B's rows, at
    least 1e-4 each. B starts at zero; l, one number for each layer, bounds the update.

    Arguments:
        rank: the number of terms.
        reach: the initial value of l.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Bini et al. 2025, Decoupling Angles and Strength in Low-rank Adaptation, arXiv:2503.18225.
    """

    rank: int = positive_integer(8)
    reach: float = nonzero(15.0)
    dropout: float = fraction(0.0)

    factors = {"a": "*stack *in rank", "b": "*stack rank *out", "l": "*stack"}
    depends_on_weight = True

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return {"a": kaiming, "b": zeros, "l": constant(self.reach)}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a, b = update.joined("a"), update.joined("b")
        lengths = (jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(f), axis), 1e-8)) for f, axis in ((a, -2), (b, -1)))
        sizes = update["l"][..., None] / self.rank
        for length in lengths:
            sizes = sizes / length
        rows = lax.stop_gradient(norms.norm(w, update, "*stack *in"))
        terms = [(rows, "*stack *in"), (a, "*stack *in rank"), (sizes, "*stack rank"), (b, "*stack rank *out")]
        return add_network(w, update, terms, update.scale)
