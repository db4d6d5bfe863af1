"""OFT and BOFT: rotations of the weight's in space, by blocks and by butterflies of blocks."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._factored import Factored
from jlora._method import Method, Update
from jlora._site import Site
from jlora.methods import _axes, _check


@final
@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Rotates a weight's in space, a block of it or a butterfly of blocks at a time: a dense update.

        R_m ... R_1 W,    R = (I - Q) (I + Q)^-1 for each block,    Q antisymmetric, zero at the start

    The first level turns blocks of neighbours; level j, blocks of what lies block^j apart, so that log(in) / log(block)
    levels connect everything with everything (BOFT).

    Arguments:
        block: the size of the blocks; block^levels divides the weight's joint in size.
        levels: the number of butterfly levels; 1 is OFT.

    Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280; Liu et al. 2023,
    Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv:2311.06243.
    """

    block: int = 32
    levels: int = 1

    reads_base = True

    def __post_init__(self) -> None:
        _check.whole(self, block=self.block, levels=self.levels)
        if self.block < 2:
            raise ValueError("OFT's block is at least 2: a block of one cannot be turned.")

    def refusal(self, site: Site) -> str:
        if site.refusal:
            return site.refusal
        n_in, _ = _axes.counts(site)
        if n_in % self.block**self.levels:
            good = [b for b in range(2, n_in + 1) if n_in % b**self.levels == 0]
            would = ", ".join(map(str, sorted(sorted(good, key=lambda b: abs(b - self.block))[:4]))) or "none"
            return f"{self.block}^{self.levels} does not divide its in size {n_in}; blocks that do: {would}"
        return ""

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        n_in, _ = _axes.counts(site)
        numbers = self.block * (self.block - 1) // 2
        return {"q": jnp.zeros((*site.sizes("stack"), self.levels, n_in // self.block, numbers), dtype)}

    def lower(self, update: Update, w: Factored) -> Factored:
        whole = _axes.matrix(w, update.roles)
        *stack, n_in, n_out = whole.shape
        turned = whole
        for level in range(self.levels):
            turn = self._turn(update["q"][..., level, :, :].astype(whole.dtype) * update.scale)
            apart = self.block**level
            split = turned.reshape(*stack, n_in // (self.block * apart), self.block, apart, n_out)
            split = jnp.moveaxis(split, -2, -3).reshape(*stack, -1, self.block, n_out)
            split = jnp.matmul(turn, split, precision=jax.lax.Precision.HIGHEST)
            split = split.reshape(*stack, n_in // (self.block * apart), apart, self.block, n_out)
            turned = jnp.moveaxis(split, -2, -3).reshape(whole.shape)
        return _axes.add_matrix(w, turned - whole, update.roles, 1.0)

    def _turn(self, numbers: jax.Array) -> jax.Array:
        """Cayley's rotation of each block's antisymmetric matrix."""
        rows, columns = jnp.triu_indices(self.block, 1)
        q = jnp.zeros((*numbers.shape[:-1], self.block, self.block), numbers.dtype).at[..., rows, columns].set(numbers)
        q = q - q.mT
        one = jnp.broadcast_to(jnp.eye(self.block, dtype=q.dtype), q.shape)
        return jnp.linalg.solve(one + q, one - q)  # the two factors commute
