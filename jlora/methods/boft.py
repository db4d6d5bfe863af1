"""BOFT: a rotation of the weight's in space by butterflies of blocks, and a scale of its out axes."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import rotations
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import positive_integer
from jlora.methods._common.initializers import ones, zeros
from jlora.methods._common.matrices import in_out
from jlora.methods._common.networks import map_axes, scale_axes


@final
@dataclasses.dataclass(frozen=True)
class BOFT(Method):
    """Rotates a weight's in space by butterflies of blocks, and scales its columns.

        R_levels ... R_1 W diag(s),    R = (I - Q) (I + Q)^-1 for each block,    s: (*stack, *out), ones at the start

    Q is antisymmetric and zero at the start. The blocks of R_1 are neighbours; one of R_j joins two half blocks that
    are 2^(j - 1) half blocks apart, so that 1 + log2(in / block) levels connect every row with every other.

    Arguments:
        block: the size of the blocks, even if there is more than one level; block * 2^(levels - 1) divides the weight's
            joint in size.
        levels: the number of butterfly levels.

    Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv:2311.06243.
    """

    block: int = positive_integer(8)
    levels: int = positive_integer(2)

    factors = {"q": "*stack levels blocks angles", "s": "*stack *out"}
    initializers = {"q": zeros, "s": ones}
    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ValueError("BOFT's block is at least 2: a block of one cannot be rotated.")
        if self.levels > 1 and self.block % 2:
            raise ValueError(
                f"BOFT's block is even, since its levels join halves of blocks: {self.block - 1} or {self.block + 1} "
                f"would do, not {self.block}."
            )

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"blocks": axes.count("*in") // self.block, "angles": rotations.angles(self.block)}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rotations.unsupported_reason(in_out(site)[0], self.block, self.levels)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        blocks = rotations.butterfly(update["q"] * update.scale, self.block)
        w = map_axes(w, update, blocks, "*in")
        return scale_axes(w, update, 1 + update.scale * (update["s"] - 1), "*stack *out")
