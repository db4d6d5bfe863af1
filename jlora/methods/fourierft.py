"""FourierFT: a few coefficients of the update's spectrum."""

import dataclasses
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.hyperparameters import choice, integer, nonzero, positive_integer, switch
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import too_many_entries
from jlora.methods._common.networks import add_structure
from jlora.methods._common.structures import Spectrum


@final
@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    """Adds the real part of an inverse discrete Fourier transform of a sparse spectrum: a dense update.

        W + s Re(IDFT2(F)),    F: (in, out), zero except for n trained coefficients

    The spectrum is divided into n equal stretches, each with one coefficient at a random place that is drawn from the
    seed and is the same for all layers of a stack. The coefficients start at zero.

    Arguments:
        n: the number of coefficients.
        scaling: s.
        seed: of the places.
        places: "stretches", or "torch" for the places that PEFT draws from the seed, anywhere in the matrix. PEFT reads
            adapters of the latter alone.
        merge_in_16_bits: whether a weight of 16 bits may be summed with the update before the product, which costs
            less and rounds the update with the weight. Weights of 32 bits are, if that costs less.

    Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv:2405.03003.
    """

    n: int = positive_integer(1000)
    scaling: float = nonzero(150.0)
    seed: int = integer(0)
    places: str = choice("stretches", "torch")
    merge_in_16_bits: bool = switch(False)

    factors = {"c": "*stack n"}
    initializers = {"c": zeros}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or too_many_entries(site, self.n)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        structure = Spectrum(update.axes.count("*in"), update.axes.count("*out"), self.n, self.seed, self.places)
        return add_structure(
            w, update, update["c"], structure, self.scaling * update.scale, may_round=self.merge_in_16_bits
        )
