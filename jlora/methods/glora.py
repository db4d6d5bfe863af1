"""GLoRA: a gain and a shift of the weight, each of a form of its own."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice, positive_integer
from jlora.methods._common.initializers import Initializer, kaiming, zeros
from jlora.methods._common.matrices import dense_matrix, rank_too_high
from jlora.methods._common.networks import Term, add_matrix, add_network, scale_axes

_VECTORS = {"vector": "*stack *out", "constant": "*stack"}


@final
@dataclasses.dataclass(frozen=True)
class GLoRA(Method):
    """Multiplies a weight by a gain and adds a shift, each of low rank, a vector, or a number.

        W + W * G + H,    G and H: A B of low rank, a vector (*stack, *out), or one number for each layer

    The product with G is elementwise. All start at zero. The paper searches the form of each layer; here a vector for
    the gain and low rank for the shift are the default, which cost as much as LoRA. A gain of low rank is dense: it
    materialises the weight.

    The paper's C, D and E change the bias of a layer, b + D b + E + W C: train the bias itself for that
    (`jlora.with_biases`).

    Arguments:
        rank: of a gain or a shift of low rank.
        gain: the form of G, "vector", "lora", "constant" or "none".
        shift: the form of H, "lora", "vector", "constant" or "none".

    Raises:
        ValueError: if a hyper-parameter is not valid, if both forms are "none", and from `jlora.init`, if the rank is
            too high.

    Example:
        jlora.init(key, sites, jlora.GLoRA(rank=8, gain="vector", shift="lora"))

    Chavan et al. 2023, One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv:2306.07967.
    """

    rank: int = positive_integer(8)
    gain: str = choice("vector", "lora", "constant", "none")
    shift: str = choice("lora", "vector", "constant", "none")

    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gain == self.shift == "none":
            raise ValueError("GLoRA's gain and shift are both 'none', so it would train nothing.")

    @property
    def depends_on_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.gain == "lora"

    def unsupported_reason(self, site: Site) -> str:
        needs_rank = "lora" in (self.gain, self.shift)
        return site.unsupported_reason or (rank_too_high(site, self.rank) if needs_rank else "")

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return _factors(self.gain, "g", "ga", "gb") | _factors(self.shift, "h", "a", "b")

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        names = self.factors_for(WeightAxes.of(site))
        return {name: kaiming if name in ("a", "ga") else zeros for name in names}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        if self.gain == "lora":
            product = jnp.matmul(update.joined("ga"), update.joined("gb"), precision=jax.lax.Precision.HIGHEST)
            base = dense_matrix(w, update.roles)
            w = add_matrix(w, update, base * product.astype(base.dtype), update.scale)
        elif self.gain != "none":
            w = scale_axes(w, update, 1 + update.scale * update["g"], _VECTORS[self.gain])
        terms: list[Term] = [(update[name], declared) for name, declared in _factors(self.shift, "h", "a", "b").items()]
        return add_network(w, update, terms, update.scale) if terms else w


def _factors(form: str, vector: str, down: str, up: str) -> dict[str, str]:
    """The arrays of a gain or of a shift, with their axes."""
    if form == "lora":
        return {down: "*stack *in rank", up: "*stack rank *out"}
    return {vector: _VECTORS[form]} if form in _VECTORS else {}
