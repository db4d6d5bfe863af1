"""AdaLoRA: an update in the form of a singular value decomposition, whose rank is a budget to be shared out."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import initializers as _start


@final
@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Adds an update in the form of a singular value decomposition.

        W + s P diag(e) Q,    P: (*stack, *in, rank),    e: (*stack, rank),    Q: (*stack, rank, *out)

    with s = alpha / rank. e starts at zero, P and Q at random. `jlora.orthogonality` is the term of the loss that keeps
    P and Q near orthogonal, and `jlora.rank_budget` the optimiser that takes rank from where it is needed least.

    Arguments:
        rank: the rank before any is taken away.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512.
    """

    rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.rank_above(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        n_in, n_out = _axes.counts(site)
        p_key, q_key = jax.random.split(key)
        p = _start.stacked(_start.normal(0.02), p_key, stack, (n_in, self.rank), dtype)
        q = _start.stacked(_start.normal(0.02), q_key, stack, (self.rank, n_out), dtype)
        return {
            "p": p.reshape(*stack, *inner, self.rank),
            "e": jnp.zeros((*stack, self.rank), dtype),
            "q": q.reshape(*stack, self.rank, *outer),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        rank = _axes.ranks(w)
        pairs = [
            (update["p"], stack + inner + rank),
            (update["e"], stack + rank),
            (update["q"], stack + rank + outer),
        ]
        scale = _check.scale(self.alpha, self.rank, False) * update.scale
        return _axes.add(w, pairs, {rank: self.rank}, scale, **_axes.dropout(update, stack))
