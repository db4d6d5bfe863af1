"""Additive: two thin matrices, each repeated along the other axis."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import tiling as _repeat


@final
@dataclasses.dataclass(frozen=True)
class Additive(Method):
    """Adds a sum of two thin matrices, each repeated to the weight's size: twice the rank for the same parameters.

        W + s (A [I ... I] + [I; ...; I] B),    A: (*stack, *in, rank),    B: (*stack, rank, *out),    s = alpha / rank

    Both start at zero, and both get gradients there. It is computed as one product of that rank, of [A [I; ...; I]] and
    [[I ... I]; B].

    Arguments:
        rank: the width of both, a divisor of the weight's joint in and out sizes; the update has twice this rank.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Raises:
        ValueError: from `jlora.init`, where the rank does not divide both sizes, with those that do.

    It has no paper: the library MoreLoRA (tic-top, 2023) introduced it.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _repeat.unsupported_reason(site, self.rank, "rank")

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        return {
            "a": jnp.zeros((*stack, *inner, self.rank), dtype),
            "b": jnp.zeros((*stack, self.rank, *outer), dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        sizes = [w.index(c).size for c in stack]
        a, b = update["a"].reshape(*sizes, -1, self.rank), update["b"].reshape(*sizes, self.rank, -1)
        down, up = _repeat.product([a], [b])
        rank = _axes.ranks(w)
        pairs = [(down, stack + inner + rank), (up, stack + rank + outer)]
        scale = _check.scale(self.alpha, self.rank, self.rank_stabilized) * update.scale
        return _axes.add(w, pairs, {rank: 2 * self.rank}, scale, **_axes.dropout(update, stack))
