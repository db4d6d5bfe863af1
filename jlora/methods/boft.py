"""BOFT: a rotation of the weight's in space by butterflies of blocks, and a scale of its out axes."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import rotations as _rotation


@final
@dataclasses.dataclass(frozen=True)
class BOFT(Method):
    """Rotates a weight's in space by butterflies of blocks, and scales its columns: a dense update.

        R_levels ... R_1 W diag(s),    R = (I - Q) (I + Q)^-1 for each block,    s: (*stack, *out), ones at the start

    Q is antisymmetric, zero at the start. The blocks of R_1 are neighbours; one of R_j joins two half blocks that lie
    2^(j - 1) half blocks apart, so that 1 + log2(in / block) levels connect everything with everything.

    Arguments:
        block: the size of the blocks, an even one where there are levels; block * 2^(levels - 1) divides the weight's
            joint in size.
        levels: the number of butterfly levels.

    Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv:2311.06243.
    """

    block: int = 8
    levels: int = 2

    depends_on_weight = True
    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ValueError("BOFT's block is at least 2: a block of one cannot be turned.")
        if self.levels > 1 and self.block % 2:
            raise ValueError(
                f"BOFT's block is even, since its levels join halves of blocks: {self.block - 1} or {self.block + 1} "
                f"would do, not {self.block}."
            )

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _rotation.unsupported_reason(_axes.counts(site)[0], self.block, self.levels)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, blocks = site.sizes("stack"), _axes.counts(site)[0] // self.block
        return {
            "q": _rotation.start((*stack, self.levels, blocks), self.block, dtype),
            "s": jnp.ones((*stack, *site.sizes("out")), dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        whole = turned = _axes.matrix(w, update.roles)
        for level in range(self.levels):
            numbers = update["q"][..., level, :, :] * update.scale
            turned = _rotation.turned(turned, numbers, self.block, 2**level)
        stack, _, outer = _axes.letters(w, update.roles)
        w = _axes.add_matrix(w, turned - whole, update.roles, 1.0)
        return _axes.multiply(w, 1 + update.scale * (update["s"] - 1), stack + outer)
