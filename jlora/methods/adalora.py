"""AdaLoRA: an update in the form of a singular value decomposition, whose ranks share a budget."""

import dataclasses
from typing import final

from jlora._interpreter.site import Site
from jlora.methods._base import Method
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import normal, zeros
from jlora.methods._common.matrices import rank_too_high


@final
@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Adds an update in the form of a singular value decomposition.

        W + s P diag(e) Q,    P: (*stack, *in, rank),    e: (*stack, rank),    Q: (*stack, rank, *out)

    with s = alpha / rank. e starts at zero, P and Q at random. `jlora.orthogonality` is the term of the loss that keeps
    P and Q nearly orthogonal, and `jlora.rank_budget` the optimiser that prunes the ranks that matter least.

    Arguments:
        rank: the rank before any is pruned.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512.
    """

    rank: int = positive_integer(12)
    alpha: float | None = nonzero(None)
    dropout: float = fraction(0.0)

    factors = {"p": "*stack *in rank", "e": "*stack rank", "q": "*stack rank *out"}
    initializers = {"p": normal(0.02), "e": zeros, "q": normal(0.02)}
    networks = ("p e q",)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)
