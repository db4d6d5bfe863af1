"""RandLoRA: a sum of random low-rank matrices, each scaled by trained vectors, of full rank."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.structured import Structure
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import random_matrices
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import integer, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_structure


def _reciprocal_size(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.full(shape, 1 / max(shape), dtype)


@final
@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """Adds a sum of products of frozen random matrices, scaled by trained vectors: a dense update of full rank.

        W + s sum_k A_k diag(d_k) B_k diag(b_k),    k = 1 ... ceil(min(in, out) / rank)

    with A_k: (larger, rank), B_k: (rank, smaller), d_k: rank numbers, b_k: as many as the smaller side, for a weight
    whose in side is the larger one; for other weights the product is transposed. The random matrices are drawn from the
    seed, and all weights share them. d starts at zero.

    Arguments:
        rank: of each term: the smaller it is, the more terms, and the more parameters.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1.
        seed: of the random matrices.
        merge_in_16_bits: whether a weight of 16 bits may be summed with the update before the product, which costs
            less and rounds the update with the weight. Weights of 32 bits are, if that costs less.

    Albert et al. 2025, RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models, arXiv:2502.00987.
    """

    rank: int = positive_integer(32)
    alpha: float | None = nonzero(None)
    seed: int = integer(0)
    merge_in_16_bits: bool = switch(False)

    factors = {"d": "*stack terms rank", "b": "*stack terms smaller"}
    initializers = {"d": zeros, "b": _reciprocal_size}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        smaller = min(axes.count("*in"), axes.count("*out"))
        return {"smaller": smaller, "terms": -(-smaller // self.rank)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        structure = _RandomProduct(n_in, n_out, self.rank, self.seed)
        b = structure.small_matrices()
        d, columns = update["d"][..., None].astype(b.dtype), update["b"][..., None, :].astype(b.dtype)
        scaled = d * columns * jnp.expand_dims(b, list(range(d.ndim - b.ndim)))
        theta = scaled.reshape(*scaled.shape[:-3], -1, structure.smaller)
        return add_structure(w, update, theta, structure, self.scale * update.scale, may_round=self.merge_in_16_bits)


@final
@dataclasses.dataclass(frozen=True)
class _RandomProduct(Structure):
    """`A theta`, transposed if the out side is the larger one, with A the random matrices of the larger side.

    Arguments:
        n_in, n_out: the size of the matrix.
        rank: of each term.
        seed: of the random matrices.
    """

    n_in: int
    n_out: int
    rank: int
    seed: int

    @property
    def is_branch(self) -> bool:
        return False  # of full rank, it costs as much as the base

    @property
    def smaller(self) -> int:
        return min(self.n_in, self.n_out)

    @property
    def terms(self) -> int:
        return -(-self.smaller // self.rank)

    def small_matrices(self) -> jax.Array:
        """B, (terms, rank, smaller)."""
        _, key = random_matrices.keys(self.seed, 2)
        b = random_matrices.rows(key, self.terms * self.rank, self.smaller)
        return b.reshape(self.terms, self.rank, self.smaller)

    def large_matrices(self) -> jax.Array:
        """A, (larger, terms * rank)."""
        key, _ = random_matrices.keys(self.seed, 2)
        return random_matrices.rows(key, max(self.n_in, self.n_out), self.terms * self.rank)

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        product = jnp.matmul(self.large_matrices(), theta, precision=jax.lax.Precision.HIGHEST)
        return product if self.n_in >= self.n_out else product.T

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        a, theta = self.large_matrices().astype(x.dtype), theta.astype(x.dtype)
        return (x @ a) @ theta if self.n_in >= self.n_out else (x @ theta.T) @ a.T

    def apply_flops(self, rows: int) -> float:
        return 2 * rows * self.terms * self.rank * (self.n_in + self.n_out)

    @property
    def matrix_flops(self) -> float:
        return 2 * self.n_in * self.n_out * self.terms * self.rank
