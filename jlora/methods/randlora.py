"""RandLoRA: a sum of random low-rank matrices, each scaled by trained vectors, of full rank."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.structured import Structure
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import random_matrices
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import integer, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import Initializer, zeros
from jlora.methods._common.matrices import in_out, rank_too_high
from jlora.methods._common.networks import add_structure


def _reciprocal_size(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jnp.full(shape, 1 / max(shape), dtype)


def _shared_matrix(seed: int, number: int) -> Initializer:
    """Uniform numbers of variance 1, which the seed alone determines."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        rows = random_matrices.rows(random_matrices.keys(seed, 2)[number], math.prod(shape[:-1]), shape[-1])
        return (rows / rows.std()).reshape(shape).astype(dtype)

    return draw


@final
@dataclasses.dataclass(frozen=True)
class RandLoRA(Method):
    """Adds a sum of products of frozen random matrices, scaled by trained vectors: a dense update of full rank.

        W + s sum_k A_k diag(d_k) B_k diag(b_k),    k = 1 ... ceil(min(in, out) / rank)

    with A_k: (larger, rank), B_k: (rank, smaller), d_k: rank numbers, b_k: as many as the smaller side, for a weight
    whose in side is the larger one; for other weights the product is transposed. The random matrices are drawn from the
    seed, and all weights share them. d starts at zero.

    PEFT's form has one small matrix B for all terms, and takes the columns of all A_k in another order. With `matrices`
    an update has this form, and files of PEFT can hold it: then one update of the adapter holds both random matrices,
    A: (larger, terms, rank) and B: (rank, smaller), of which each weight takes leading parts.

    Arguments:
        rank: of each term: the smaller it is, the more terms, and the more parameters.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1.
        seed: of the random matrices.
        merge_in_16_bits: whether a weight of 16 bits may be summed with the update before the product, which costs
            less and rounds the update with the weight. Weights of 32 bits are, if that costs less.
        matrices: (larger, smaller), for PEFT's form: sizes that no weight exceeds with its larger and its smaller side.

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if it does not fit the weight.

    Example:
        jlora.init(key, sites, jlora.RandLoRA(rank=32, alpha=64, matrices=(4096, 1024)))

    Albert et al. 2025, RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models, arXiv:2502.00987.
    """

    rank: int = positive_integer(32)
    alpha: float | None = nonzero(None)
    seed: int = integer(0)
    merge_in_16_bits: bool = switch(False)
    matrices: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.matrices is not None:
            object.__setattr__(self, "matrices", _checked(self.matrices, self.rank))

    @property
    def frozen(self) -> tuple[str, ...]:
        return () if self.matrices is None else ("large", "small")

    @property
    def shared_arrays(self) -> tuple[str, ...]:
        return self.frozen

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        trained = {"d": "*stack terms rank", "b": "*stack terms smaller"}
        shared = {"large": "larger all_terms rank", "small": "rank widest"}
        return trained if self.matrices is None else trained | shared

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        large, small = (_shared_matrix(self.seed, number) for number in (0, 1))
        return {"d": zeros, "b": _reciprocal_size, "large": large, "small": small}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        reason = site.unsupported_reason or rank_too_high(site, self.rank)
        if reason or self.matrices is None:
            return reason
        larger, smaller = max(in_out(site)), min(in_out(site))
        if larger <= self.matrices[0] and smaller <= self.matrices[1]:
            return ""
        return f"its sides are {larger} and {smaller}, and matrices={self.matrices} must be at least as large"

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        smaller = min(axes.count("*in"), axes.count("*out"))
        sizes = {"smaller": smaller, "terms": -(-smaller // self.rank)}
        if self.matrices is None:
            return sizes
        larger, widest = self.matrices
        return sizes | {"larger": larger, "widest": widest, "all_terms": -(-widest // self.rank)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        is_shared = self.matrices is not None
        structure = _RandomProduct(n_in, n_out, self.rank, self.seed, n_in < n_out + is_shared)
        dtype = accumulation_dtype(update["d"].dtype)
        d, b = update["d"].astype(dtype), update["b"].astype(dtype)
        if is_shared:
            small = update["small"][:, None, : structure.smaller].astype(dtype)
            scaled = d.mT[..., None] * b[..., None, :, :]
            matrices = [update["large"][: structure.larger, : structure.terms].reshape(structure.larger, -1)]
        else:
            small = structure.small_matrices().astype(dtype)
            scaled = d[..., None] * b[..., None, :]
            matrices = []
        scaled = scaled * jnp.expand_dims(small, list(range(scaled.ndim - small.ndim)))
        theta = scaled.reshape(*scaled.shape[:-3], -1, structure.smaller)
        scale = self.scale * update.scale
        return add_structure(w, update, theta, structure, scale, shared=matrices, may_round=self.merge_in_16_bits)


def _checked(matrices: Any, rank: int) -> tuple[int, int]:
    """The sizes of the random matrices as Python integers.

    Raises:
        ValueError: unless they are two integers, the first one not the smaller, and none below the rank.
    """
    listed = tuple(matrices) if isinstance(matrices, (tuple, list)) else ()
    are_integers = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in listed)
    if len(listed) != 2 or not are_integers or not rank <= listed[1] <= listed[0]:
        raise ValueError(
            f"RandLoRA's matrices are two sizes (larger, smaller), not below the rank {rank}, and not {matrices!r}."
        )
    return int(listed[0]), int(listed[1])


@final
@dataclasses.dataclass(frozen=True)
class _RandomProduct(Structure):
    """`A theta`, or its transpose, with A the random matrices of the larger side.

    Arguments:
        n_in, n_out: the size of the matrix.
        rank: of each term.
        seed: of the random matrices, if they are no constants of the structure.
        is_transposed: whether the matrix is the transpose.
    """

    n_in: int
    n_out: int
    rank: int
    seed: int
    is_transposed: bool

    @property
    def is_branch(self) -> bool:
        return False  # of full rank, it costs as much as the base

    @property
    def smaller(self) -> int:
        return min(self.n_in, self.n_out)

    @property
    def larger(self) -> int:
        return max(self.n_in, self.n_out)

    @property
    def terms(self) -> int:
        return -(-self.smaller // self.rank)

    def small_matrices(self) -> jax.Array:
        """B, (terms, rank, smaller)."""
        _, key = random_matrices.keys(self.seed, 2)
        b = random_matrices.rows(key, self.terms * self.rank, self.smaller)
        return b.reshape(self.terms, self.rank, self.smaller)

    def large_matrices(self, *constants: jax.Array) -> jax.Array:
        """A, (larger, terms * rank)."""
        if constants:
            return constants[0]
        key, _ = random_matrices.keys(self.seed, 2)
        return random_matrices.rows(key, self.larger, self.terms * self.rank)

    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        large = self.large_matrices(*constants).astype(theta.dtype)
        product = jnp.matmul(large, theta, precision=jax.lax.Precision.HIGHEST)
        return product.T if self.is_transposed else product

    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        a, theta = self.large_matrices(*constants).astype(x.dtype), theta.astype(x.dtype)
        return (x @ theta.T) @ a.T if self.is_transposed else (x @ a) @ theta

    def apply_flops(self, rows: int) -> float:
        return 2 * rows * self.terms * self.rank * (self.n_in + self.n_out)

    @property
    def matrix_flops(self) -> float:
        return 2 * self.n_in * self.n_out * self.terms * self.rank
