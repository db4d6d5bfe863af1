"""LoCon: a low-rank convolution with a core, so that the window costs rank x rank numbers and no channels."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class LoCon(Method):
    """Adds to a convolution's kernel its Tucker decomposition along the channels.

        W + s A G B,    A: (*stack, *channels, rank),    G: (*stack, *window, rank, rank),    B: (*stack, rank, *out)

    with s = alpha / rank: a pointwise convolution onto the rank, one with the window, and a pointwise one from the
    rank. `LoRA` on the same kernel has A: (*window, *channels, rank). B starts at zero. A weight without a window has
    no core, and its update is that of `LoRA`.

    Arguments:
        rank: the number of channels between, at most those of the input and of the output.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Yeh et al. 2023, Navigating Text-To-Image Customization, arXiv:2309.14859.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    dropout: float = fraction(0.0)

    initializers = {"a": kaiming, "core": kaiming, "b": zeros}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        if not axes.axes("*window"):
            return {"a": "*stack *channels rank", "b": "*stack rank *out"}
        return {
            "a": "*stack *channels rank",
            "b": "*stack core_rank *out",
            "core": "*stack *window rank core_rank",
        }

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"core_rank": self.rank}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        terms = [(update[name], declared) for name, declared in update.declared.items()]
        return add_network(w, update, terms, self.scale * update.scale)
