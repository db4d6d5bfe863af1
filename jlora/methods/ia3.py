"""IA3: a trained vector that scales the weight along its out or its in axes."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check


@final
@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Multiplies a weight by a vector along its out axes, or its in axes: what it hands on, or takes in, is scaled.

        W diag(l)    or    diag(l) W,    l: (*stack, *out) or (*stack, *in), ones at the start

    A gain and no network: the cost of a bias. In a convolution "in" is its input channels, whatever their place in the
    window.

    Arguments:
        axis: "out" (keys, values) or "in" (the second feed-forward kernel).

    Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
    arXiv:2205.05638.
    """

    axis: str = "out"

    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.choice(self, "out", "in", axis=self.axis)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        along = site.sizes("out") if self.axis == "out" else _axes.channels(site)
        return {"l": jnp.ones((*site.sizes("stack"), *along), dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, _, outer = _axes.letters(w, update.roles)
        along = outer if self.axis == "out" else _axes.within(w, update.roles)[0]
        vector = update["l"]
        if update.scale != 1:
            vector = 1 + update.scale * (vector - 1)
        return _axes.multiply(w, vector, stack + along)
