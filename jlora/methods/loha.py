"""LoHa: the elementwise product of two low-rank matrices, as LyCORIS and PEFT define it."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer
from jlora.methods._common.initializers import Initializer
from jlora.methods.hadamard import Hadamard


@final
@dataclasses.dataclass(frozen=True)
class LoHa(Method):
    """Adds the elementwise product of two low-rank matrices of the same rank.

        W + s (A0 B0) * (A1 B1),    Aj: (*stack, *in, rank),    Bj: (*stack, rank, *out),    s = alpha / rank

    Its rank is up to rank^2, and so is its cost; it is `Hadamard(2 * rank, k=2)` with a scale of its own.

    Arguments:
        rank: the rank of each of the two.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Yeh et al. 2023, Navigating Text-To-Image Customization, arXiv:2309.14859; Hyeon-Woo et al. 2021, arXiv:2108.06098.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    dropout: float = fraction(0.0)

    factors = {
        "a0": "*stack *in rank",
        "b0": "*stack rank *out",
        "a1": "*stack *in rank",
        "b1": "*stack rank *out",
    }

    @property
    def product(self) -> Hadamard:
        """The same as a Hadamard product."""
        alpha = None if self.alpha is None else 2 * self.alpha
        return Hadamard(2 * self.rank, 2, "lora", alpha, dropout=self.dropout)

    def unsupported_reason(self, site: Site) -> str:
        return self.product.unsupported_reason(site)

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return self.product.initializers_for(site)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        return self.product.lower(update, w)
