"""PaRa: a subspace of the weight's out space is removed."""

import dataclasses
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import subspaces
from jlora.methods._common.hyperparameters import choice, positive_integer, switch
from jlora.methods._common.initializers import normal
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class PaRa(Method):
    """Takes a low-rank part of a weight away.

        W - W D P,    P: (*stack, rank, *out)

        projection="qr":    D = P^T (P P^T)^-1, so that D P projects onto the rows of P
        projection="relu":  D = relu(P)^T, as in PEFT by default

    No P leaves the weight as it is and has a gradient. So what the initial P takes away is added again by default, at
    the cost of twice the rank; with `offset=False`, as in the paper, the program does not start at the base.

    Arguments:
        rank: of the part.
        projection: "qr" or "relu".
        offset: whether the program equals the base at the start.

    Raises:
        ValueError: from `jlora.init`, if the rank is above the weight's out or in size.

    Chen et al. 2024, PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction, arXiv:2406.05641.
    """

    rank: int = positive_integer(8)
    projection: str = choice("qr", "relu")
    offset: bool = dataclasses.field(default=True, kw_only=True, metadata=switch(True).metadata)

    factors = {"p": "*stack rank *out"}
    initializers = {"p": normal(0.02)}
    depends_on_weight = True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        p = update.joined("p")
        image = subspaces.image_of(w, update, p, self.projection)
        return add_network(w, update, [(image, "*stack *in rank"), (p, "*stack rank *out")], -update.scale)
