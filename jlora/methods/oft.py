"""OFT: a rotation of the weight's in space, by blocks."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import rotations
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import positive_integer
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import in_out
from jlora.methods._common.networks import map_axes


@final
@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Rotates a weight's in space, one block at a time.

        R W,    R = (I - Q) (I + Q)^-1 for each block,    Q antisymmetric, zero at the start

    Arguments:
        block: the size of the blocks, which divides the weight's joint in size.

    Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280.
    """

    block: int = positive_integer(32)

    factors = {"q": "*stack blocks angles"}
    initializers = {"q": zeros}
    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ValueError("OFT's block is at least 2: a block of one cannot be rotated.")

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"blocks": axes.count("*in") // self.block, "angles": rotations.angles(self.block)}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rotations.unsupported_reason(in_out(site)[0], self.block)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        return map_axes(w, update, rotations.cayley(update["q"] * update.scale, self.block), "*in")
