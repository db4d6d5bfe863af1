"""VeRA: random matrices that all weights share, and trained vectors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import final

import jax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import random_matrices
from jlora.methods._common.hyperparameters import fraction, integer, number, positive_integer
from jlora.methods._common.initializers import Initializer, constant, zeros
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Adds a product of two frozen random matrices, scaled by two trained vectors.

        W + A diag(d) B diag(b),    A: (in, rank),    B: (rank, out),    d: (*stack, rank),    b: (*stack, *out)

    A and B are the leading rows and columns of two matrices that all weights with the same seed share; they are drawn
    from the seed when they are needed, and are neither kept nor saved. b starts at zero.

    Arguments:
        rank: the width of the random matrices.
        d_initial: the initial value of every entry of d.
        seed: of the random matrices.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454.
    """

    rank: int = positive_integer(256)
    d_initial: float = number(0.1)
    seed: int = integer(0)
    dropout: float = fraction(0.0)

    factors = {"d": "*stack rank", "b": "*stack *out"}

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return {"d": constant(self.d_initial), "b": zeros}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a, b = shared_matrices(self.seed, update.axes.count("*in"), update.axes.count("*out"), self.rank)
        terms = [(a, "*in rank"), (update["d"], "*stack rank"), (b, "rank *out"), (update["b"], "*stack *out")]
        return add_network(w, update, terms, update.scale)


def shared_matrices(seed: int, n_in: int, n_out: int, rank: int, halves: int = 1) -> tuple[jax.Array, jax.Array]:
    """The leading parts of two endless random matrices, uniform with a variance of 2 / in and 2 / rank (He).

    Arguments:
        seed: of both matrices.
        n_in, n_out, rank: the sizes; the same entries come first for all sizes, up to the scale of the first matrix.
        halves: how many times the rank A is wide.

    Returns:
        A `(in, halves * rank)` and B `(rank, out)`.
    """
    a_key, b_key = random_matrices.keys(seed, 2)
    a = math.sqrt(6 / n_in) * random_matrices.rows(a_key, n_in, halves * rank)
    return a, math.sqrt(6 / rank) * random_matrices.rows(b_key, n_out, rank).T
