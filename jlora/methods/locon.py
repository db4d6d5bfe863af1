"""LoCon: a low-rank convolution with a core, so that the window costs rank x rank numbers and no channels."""

import dataclasses
import math
from typing import Any, final

import jax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import initializers as _start


@final
@dataclasses.dataclass(frozen=True)
class LoCon(Method):
    """Adds to a convolution's kernel its Tucker decomposition along the channels.

        W + s A G B,    A: (*stack, *channels, rank),    G: (*stack, *window, rank, rank),    B: (*stack, rank, *out)

    with s = alpha / rank: a pointwise convolution onto the rank, one with the window there, a pointwise one from it.
    `LoRA` on the same kernel has A: (*window, *channels, rank). B starts at zero. A weight without a window has no
    core, and its update is `LoRA`'s.

    Arguments:
        rank: the number of channels between, at most those of the input and of the output.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Yeh et al. 2023, Navigating Text-To-Image Customization, arXiv:2309.14859.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _axes.rank_above(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        keys = jax.random.split(key)
        stack, outer, channels = site.sizes("stack"), site.sizes("out"), _axes.channels(site)
        window = site.sizes("window")
        n_in, n_out = _axes.counts(site)
        a = _start.stacked(_start.kaiming, keys[0], stack, (n_in // math.prod(window), self.rank), dtype)
        arrays = {
            "a": a.reshape(*stack, *channels, self.rank),
            "b": _start.stacked(_start.zeros, keys[0], stack, (self.rank, n_out), dtype).reshape(*stack, -1, *outer),
        }
        if window:
            core = _start.stacked(_start.kaiming, keys[1], stack, (math.prod(window) * self.rank, self.rank), dtype)
            arrays["core"] = core.reshape(*stack, *window, self.rank, self.rank)
        return arrays

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, _, outer = _axes.letters(w, update.roles)
        channels, window = _axes.within(w, update.roles)
        one, two = _axes.ranks(w, 2)
        core = [(update["core"], stack + window + one + two)] if window else []
        two = two if window else one
        pairs = [(update["a"], stack + channels + one), *core, (update["b"], stack + two + outer)]
        scale = _check.scale(self.alpha, self.rank, False) * update.scale
        return _axes.add(w, pairs, {one: self.rank, two: self.rank}, scale, **_axes.dropout(update, stack))
