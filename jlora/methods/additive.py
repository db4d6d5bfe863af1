"""Additive: two thin matrices, each repeated along the other axis."""

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
class Additive(Method):
    """Adds a sum of two thin matrices, each repeated to the weight's size: twice the rank for the same parameters.

        W + s (A [I ... I] + [I; ...; I] B),    A: (*stack, *in, rank),    B: (*stack, rank, *out),    s = alpha / rank

    Both start at zero, and both get gradients there. In letters: `ir -> i, (t r)` and `ro -> (t r), o`.

    Arguments:
        rank: the width of both, a divisor of the weight's joint in and out sizes; the update has twice this rank.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Raises:
        ValueError: from `jlora.init`, where the rank divides no block of the weight's axes, with those that would do.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check.whole(self, rank=self.rank)
        _check.share(self, dropout=self.dropout)

    def refusal(self, site: Site) -> str:
        return site.refusal or _axes.repeats(site, self.rank, "rank")

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        return {
            "a": jnp.zeros((*stack, *inner, self.rank), dtype),
            "b": jnp.zeros((*stack, self.rank, *outer), dtype),
        }

    def lower(self, update: Update, w: Factored) -> Factored:
        stack, inner, outer = _axes.letters(w, update.roles)
        w, _, column = _axes.blocks(w, outer, self.rank)
        w, _, row = _axes.blocks(w, inner, self.rank)
        stack, inner, outer = _axes.letters(w, update.roles)
        scale = _check.scale(self.alpha, self.rank, self.rank_stabilized) * update.scale
        options = _axes.dropout(update, stack)
        w = _axes.add(w, [(update["a"], stack + inner + column)], {}, scale, **options)
        return _axes.add(w, [(update["b"], stack + row + outer)], {}, scale, **options)
