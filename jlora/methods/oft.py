"""OFT: a rotation of the weight's in space, by blocks."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import rotations
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import integer, nonzero, positive_integer, switch
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
        shared: whether all blocks of a weight have one rotation. Then the rotation acts on the input of a convolution
            too, if the blocks divide the channels, and these come after the window in the kernel.
        eps: the largest norm of all Q of a weight together, |Q| <= eps / sqrt(blocks) for each; None does not limit it
            (constrained OFT). A larger Q is scaled down, and its gradient is that at the scaled one.
        neumann_terms: if not 0, the inverse is a series: R = I - 2 Q + 2 Q^2 - ... +- Q^(n - 1), n of 4 or more. It is
            cheaper for large blocks, and a rotation up to an error of the size |Q|^n.

    Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280; the series: Qiu et
    al. 2025, Orthogonal Finetuning Made Scalable, arXiv:2506.19847.
    """

    block: int = positive_integer(32)
    shared: bool = switch(False)
    eps: float | None = nonzero(None)
    neumann_terms: int = integer(0)

    factors = {"q": "*stack blocks angles"}
    initializers = {"q": zeros}
    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ValueError("OFT's block is at least 2: a block of one cannot be rotated.")
        if self.neumann_terms and self.neumann_terms < 4:
            raise ValueError(f"OFT's neumann_terms is 0, or 4 or more, not {self.neumann_terms}.")
        if self.eps is not None and self.eps < 0:
            raise ValueError(f"OFT's eps is positive, not {self.eps}.")

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        blocks = 1 if self.shared else axes.count("*in") // self.block
        return {"blocks": blocks, "angles": rotations.angles(self.block)}

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rotations.unsupported_reason(in_out(site)[0], self.block)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        angles = self._limited(update["q"]) * update.scale
        return map_axes(w, update, rotations.cayley(angles, self.block, self.neumann_terms), "*in")

    def _limited(self, angles: jax.Array) -> jax.Array:
        """The angles, scaled down where the norm of Q is above the limit."""
        if self.eps is None:
            return angles
        norm = jnp.sqrt(2 * jnp.square(angles).sum(-1, keepdims=True))
        limit = self.eps / angles.shape[-2] ** 0.5
        scaled = jnp.where(norm <= limit, angles, angles * (limit / jnp.maximum(norm, limit)))
        return angles + lax.stop_gradient(scaled - angles)
