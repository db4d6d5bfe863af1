"""PVeRA: VeRA with a distribution of what is between its two random matrices."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.hyperparameters import fraction, integer, number, positive_integer
from jlora.methods._common.initializers import Initializer, constant, zeros
from jlora.methods._common.networks import add_network
from jlora.methods.vera import shared_matrices


@final
@dataclasses.dataclass(frozen=True)
class PVeRA(Method):
    """Adds a product of two frozen random matrices, between which numbers are drawn in training.

        W + A diag(d) B diag(b),                                           the mean: without a key, and merged
        y = x W + (x A diag(d) + e * exp(x C diag(c) / 2)) B diag(b),   e standard normal, with `jlora.with_dropout`

    A: (in, rank), C: (in, rank), B: (rank, out), d, c: (*stack, rank), b: (*stack, *out)

    A and C are the leading rows of one random matrix of twice the rank, and B those of another; all weights with the
    same seed share them. They are drawn from the seed when they are needed, and are neither kept nor saved. b starts at
    zero.

    Arguments:
        rank: the width of A, of C and of B.
        d_initial: the initial value of every entry of d and of c.
        seed: of the random matrices.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Fillioux et al. 2025, PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv:2512.07703.
    """

    rank: int = positive_integer(256)
    d_initial: float = number(0.1)
    seed: int = integer(0)
    dropout: float = fraction(0.0)

    factors = {"d": "*stack rank", "c": "*stack rank", "b": "*stack *out"}
    is_sampled = True

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return {"d": constant(self.d_initial), "c": constant(self.d_initial), "b": zeros}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        both, b = shared_matrices(self.seed, update.axes.count("*in"), update.axes.count("*out"), self.rank, halves=2)
        mean = [(both[:, : self.rank], "*in rank"), (update["d"], "*stack rank")]
        rest = [(b, "rank *out"), (update["b"], "*stack *out")]
        if update.key is None:
            return add_network(w, update, [*mean, *rest], update.scale)
        vectors = jnp.stack([update["d"], update["c"]], axis=-2)
        halves = both.reshape(-1, 2, self.rank) * vectors[..., None, :, :]
        return add_network(w, update, [(halves, "*stack *in half rank"), *rest], update.scale, latent="half")
