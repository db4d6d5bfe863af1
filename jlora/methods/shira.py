"""SHiRA: a sparse update."""

import dataclasses
from collections.abc import Mapping
from typing import final

import numpy as np

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.digits import from_digits, to_digits, traced_digits
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import integer, optional, positive_integer, switch
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import in_out, too_many_entries
from jlora.methods._common.networks import add_structure
from jlora.methods._common.sparse_structures import Placed, Scattered

_DIGITS = 3


@final
@dataclasses.dataclass(frozen=True)
class SHiRA(Method):
    """Trains a few of the weight's own entries: a dense update of high rank, with as many numbers as LoRA's.

        W + S,    S: (in, out), zero except for rank (in + out) trained entries

    The weight is divided into as many equal stretches, each with one entry at a random place that is drawn from the
    seed and is the same for all layers of a stack. The entries start at zero. An update that was read from a file of
    PEFT holds the places of its entries (`seed=None`), `(*stack, entries, 2, digits)`: the out and the in index, as
    digits to the base 256.

    Arguments:
        rank: of the LoRA that has as many parameters.
        seed: of the places; None if the update holds them.
        merge_in_16_bits: whether a weight of 16 bits may be summed with the update before the product, which costs
            less and rounds the update with the weight. Weights of 32 bits are, if that costs less.

    Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175.
    """

    rank: int = positive_integer(8)
    seed: int | None = optional(integer(0))
    merge_in_16_bits: bool = switch(False)

    factors = {"s": "*stack entries"}
    initializers = {"s": zeros}

    @property
    def frozen(self) -> tuple[str, ...]:
        return () if self.seed is not None else ("place",)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return self.factors if self.seed is not None else {**self.factors, "place": "*stack entries side digits"}

    def unsupported_reason(self, site: Site) -> str:
        if self.seed is None:
            return "its places come from a file; pass a seed"
        return site.unsupported_reason or too_many_entries(site, self.rank * sum(in_out(site)))

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"entries": self.rank * (axes.count("*in") + axes.count("*out")), "side": 2, "digits": _DIGITS}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        if self.seed is None:
            places = from_digits(update["place"])
            flat = traced_digits(places[..., 0] * n_in + places[..., 1], 4)
            structure, constants = Placed(n_in, n_out, self.rank * (n_in + n_out)), (flat,)
        else:
            structure, constants = self._structure(n_in, n_out), ()
        scale = update.scale
        return add_structure(w, update, update["s"], structure, scale, *constants, may_round=self.merge_in_16_bits)

    def with_places(self, update: Update) -> Update:
        """The update with the places of its entries as an array, and without a seed."""
        if self.seed is None:
            return update
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        rows, columns = map(np.asarray, self._structure(n_in, n_out).positions())
        method = dataclasses.replace(self, seed=None)
        digits = to_digits(np.stack([columns, rows], -1), _DIGITS)
        place = np.broadcast_to(digits, method.shapes(update.axes)["place"])
        return dataclasses.replace(update, method=method, frozen={"place": place})

    def _structure(self, n_in: int, n_out: int) -> Scattered:
        assert self.seed is not None
        return Scattered(n_in, n_out, self.rank * (n_in + n_out), self.seed)
