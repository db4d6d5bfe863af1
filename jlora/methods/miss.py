"""MiSS: one thin matrix, repeated along the in axes."""

import dataclasses
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import tiling
from jlora.methods._common.hyperparameters import fraction, positive_integer
from jlora.methods._common.initializers import zeros
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class MiSS(Method):
    """Adds one thin matrix, repeated along the weight's in axes.

        W + [I; ...; I] B,    B: (*stack, rank, *out), zero at the start

    The input is summed in strides of the rank, by a product with the identities, and then multiplied by B.

    Arguments:
        rank: the height of B, a divisor of the weight's joint in size.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Kang and Yin 2024, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure,
    arXiv:2409.15371.
    """

    rank: int = positive_integer(64)
    dropout: float = fraction(0.0)

    factors = {"b": "*stack rank *out"}
    initializers = {"b": zeros}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or tiling.unsupported_reason(site, self.rank, "rank", both=False)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        identities = tiling.identities(self.rank, update.axes.count("*in"), update["b"].dtype)
        terms = [(identities, "*in rank"), (update["b"], "*stack rank *out")]
        return add_network(w, update, terms, update.scale)
