"""IA3: a trained vector that scales the weight along its out or its in axes."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax

from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice
from jlora.methods._common.initializers import ones
from jlora.methods._common.networks import scale_axes


@final
@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Multiplies a weight by a vector along its out axes, or along its in axes.

        W diag(l)    or    diag(l) W,    l: (*stack, *out) or (*stack, *in), ones at the start

    It has no network, and costs as much as a bias. In a convolution "in" means the input channels, whatever their place
    in the window.

    Arguments:
        axis: "out" (keys, values) or "in" (the second feed-forward kernel).

    Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
    arXiv:2205.05638.
    """

    axis: str = choice("out", "in")

    initializers = {"l": ones}
    is_multiplicative = True

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return {"l": "*stack *out" if self.axis == "out" else "*stack *channels"}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        vector = update["l"]
        if isinstance(update.scale, jax.Array) or update.scale != 1:
            vector = 1 + update.scale * (vector - 1)
        return scale_axes(w, update, vector, update.declared["l"])
