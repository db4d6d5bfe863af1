"""OFT: a rotation of the weight's in space, by blocks."""

import dataclasses
from typing import Any, final

import jax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import rotations as _rotation


@final
@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Rotates a weight's in space, a block of it at a time: a dense update.

        R W,    R = (I - Q) (I + Q)^-1 for each block,    Q antisymmetric, zero at the start

    Arguments:
        block: the size of the blocks, which divides the weight's joint in size.

    Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280.
    """

    block: int = 32

    depends_on_weight = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ValueError("OFT's block is at least 2: a block of one cannot be turned.")

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _rotation.unsupported_reason(_axes.counts(site)[0], self.block)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        blocks = _axes.counts(site)[0] // self.block
        return {"q": _rotation.start((*site.sizes("stack"), blocks), self.block, dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        whole = _axes.matrix(w, update.roles)
        turned = _rotation.turned(whole, update["q"] * update.scale, self.block)
        return _axes.add_matrix(w, turned - whole, update.roles, 1.0)
