"""DeLoRA: normalised rank-one terms, and how far they may reach."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import initializers as _start
from jlora.methods._common import norms as _norm


@final
@dataclasses.dataclass(frozen=True)
class DeLoRA(Method):
    """Adds normalised rank-one terms: their directions and their common reach are trained apart.

        W + diag(|W|) A diag(l / (rank |a_k| |b_k|)) B,    A: (*stack, *in, rank),    B: (*stack, rank, *out)

    |W| holds the norms of the weight's rows (over the out axes), |a_k| and |b_k| those of A's columns and B's rows, at
    least 1e-4 each. B starts at zero; l, one number a layer, bounds the update.

    Arguments:
        rank: the number of terms.
        reach: the value at which l starts.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Bini et al. 2025, Decoupling Angles and Strength in Low-rank Adaptation, arXiv:2503.18225.
    """

    rank: int = 8
    reach: float = 15.0
    dropout: float = 0.0

    depends_on_weight = True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.rank_above(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        a = _start.stacked(_start.kaiming, key, stack, (_axes.counts(site)[0], self.rank), dtype)
        return {
            "a": a.reshape(*stack, *inner, self.rank),
            "b": jnp.zeros((*stack, self.rank, *outer), dtype),
            "l": jnp.full(stack, self.reach, dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        sizes = [w.index(c).size for c in stack]
        a = update["a"].reshape(*sizes, -1, self.rank)
        b = update["b"].reshape(*sizes, self.rank, -1)
        lengths = (jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(f), axis), 1e-8)) for f, axis in ((a, -2), (b, -1)))
        reach = update["l"][..., None] / self.rank
        for length in lengths:
            reach = reach / length
        rank = _axes.ranks(w)
        rows = lax.stop_gradient(_norm.norm(w, stack + inner))
        pairs = [(rows, stack + inner), (a, stack + inner + rank), (reach, stack + rank), (b, stack + rank + outer)]
        return _axes.add(w, pairs, {rank: self.rank}, update.scale, **_axes.dropout(update, stack))
