"""VeRA: random matrices that all weights share, and trained vectors."""

import dataclasses
import math
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import random_matrices as _random


@final
@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Adds a product of two frozen random matrices, scaled by two trained vectors.

        W + A diag(d) B diag(b),    A: (in, rank),    B: (rank, out),    d: (*stack, rank),    b: (*stack, *out)

    A and B are the leading rows and columns of two matrices that all weights with the same seed share; they are drawn
    from the seed wherever they are needed, and neither kept nor saved. b starts at zero.

    Arguments:
        rank: the width of the random matrices.
        d_initial: the value at which every entry of d starts.
        seed: of the random matrices.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454.
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, outer = site.sizes("stack"), site.sizes("out")
        return {"d": jnp.full((*stack, self.rank), self.d_initial, dtype), "b": jnp.zeros((*stack, *outer), dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        a, b = shared(self.seed, w.size(inner), w.size(outer), self.rank)
        rank = _axes.ranks(w)
        pairs = [(a, inner + rank), (update["d"], stack + rank), (b, rank + outer), (update["b"], stack + outer)]
        return _axes.add(w, pairs, {rank: self.rank}, update.scale, **_axes.dropout(update, stack))


def shared(seed: int, n_in: int, n_out: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """The leading parts of two endless random matrices, uniform with a variance of 2 / in and 2 / rank (He)."""
    a_key, b_key = _random.keys(seed, 2)
    return math.sqrt(6 / n_in) * _random.rows(a_key, n_in, rank), math.sqrt(6 / rank) * _random.rows(
        b_key, n_out, rank
    ).T
