"""Additive: two thin matrices, each repeated along the other axis."""

import dataclasses
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import tiling
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import zeros
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class Additive(Method):
    """Adds a sum of two thin matrices, each repeated to the weight's size: twice the rank for the same parameters.

        W + s (A [I ... I] + [I; ...; I] B),    A: (*stack, *in, rank),    B: (*stack, rank, *out),    s = alpha / rank

    Both start at zero, and both receive gradients there. It is computed as one product of rank 2 rank, of
    [A [I; ...; I]] and [[I ... I]; B].

    Arguments:
        rank: the width of both, a divisor of the weight's joint in and out sizes; the update has twice this rank.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: from `jlora.init`, if the rank does not divide both sizes, with those that do.

    It has no paper: the library MoreLoRA (tic-top, 2023) introduced it.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)

    factors = {"a": "*stack *in rank", "b": "*stack rank *out"}
    initializers = {"a": zeros, "b": zeros}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or tiling.unsupported_reason(site, self.rank, "rank")

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a, b = tiling.product([update.joined("a")], [update.joined("b")])
        terms = [(a, "*stack *in twice_rank"), (b, "*stack twice_rank *out")]
        return add_network(w, update, terms, self.scale * update.scale)
