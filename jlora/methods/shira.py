"""SHiRA: a sparse update."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import integer, positive_integer, switch
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import in_out, too_many_entries
from jlora.methods._common.networks import add_structure
from jlora.methods._common.structures import Scattered


@final
@dataclasses.dataclass(frozen=True)
class SHiRA(Method):
    """Trains a few of the weight's own entries: a dense update of high rank, with as many numbers as LoRA's.

        W + S,    S: (in, out), zero except for rank (in + out) trained entries

    The weight is divided into as many equal stretches, each with one entry at a random place that is drawn from the
    seed and is the same for all layers of a stack. The entries start at zero.

    Arguments:
        rank: of the LoRA that has as many parameters.
        seed: of the places.
        merge_in_16_bits: whether a weight of 16 bits may be summed with the update before the product, which costs
            less and rounds the update with the weight. Weights of 32 bits are, if that costs less.

    Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175.
    """

    rank: int = positive_integer(8)
    seed: int = integer(0)
    merge_in_16_bits: bool = switch(False)

    factors = {"s": "*stack entries"}
    initializers = {"s": zeros}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or too_many_entries(site, self.rank * sum(in_out(site)))

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"entries": self.rank * (axes.count("*in") + axes.count("*out"))}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        structure = Scattered(n_in, n_out, self.sizes(update.axes)["entries"], self.seed)
        return add_structure(w, update, update["s"], structure, update.scale, may_round=self.merge_in_16_bits)
