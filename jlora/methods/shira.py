"""SHiRA: a sparse update."""

import dataclasses
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
class SHiRA(Method):
    """Trains a few of the weight's own entries: a dense update of high rank, with as many numbers as LoRA's.

        W + S,    S: (in, out), zero but for rank (in + out) trained entries

    One entry lies in each of as many equal stretches of the weight, drawn from the seed and the same for all layers
    of a stack. They start at zero.

    Arguments:
        rank: of the LoRA that has as many parameters.
        seed: of the places.

    Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175.
    """

    rank: int = 8
    seed: int = 0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.too_many(site, self.rank * sum(_axes.counts(site)))

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        return {"s": jnp.zeros((*site.sizes("stack"), self.rank * sum(_axes.counts(site))), dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        _, inner, outer = _axes.letters(w, update.roles)
        delta = _random.scattered(update["s"], self.seed, w.size(inner), w.size(outer))
        return _axes.add_matrix(w, delta, update.roles, update.scale)
