"""SharedLoRA: a LoRA of experts that have one of the two matrices in common."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora.methods._base import Method
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice, fraction, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import Initializer, kaiming_of_outputs, normal, zeros
from jlora.methods._common.matrices import rank_too_high
from jlora.methods.lora import LoRA, pair_initializers


@final
@dataclasses.dataclass(frozen=True)
class SharedLoRA(Method):
    """Adds a product of two thin matrices to each expert; all experts have one A, or one B, in common.

        W_e + s A B_e,    A: (*layers, *in, rank),     B: (*stack, rank, *out),     s = alpha / rank
        W_e + s A_e B,    A: (*stack, *in, rank),      B: (*layers, rank, *out),    with `shared="b"`

    The experts are the last stack axis of the weight, and the layers are the stack axes before it: each layer of a scan
    over layers with experts has a shared matrix of its own. Without experts, the layers of a scan share it; a weight
    without a stack has a plain LoRA. With "a" for the kernels that read the hidden state and "b" for those that write
    it, the outer factors are shared: one copy of each instead of one for every expert.

    The shared matrix starts at random, as A of a LoRA does, and the other at zero: so an expert without tokens, whose
    matrix gets no gradient, does not change.

    Arguments:
        rank: the rank of the update of one expert.
        alpha, rank_stabilized, dropout: as for `LoRA`.
        shared: the matrix that the experts share, "a" or "b".

    Example:
        targets = {".*/experts/up": jlora.SharedLoRA(8), ".*/experts/down": jlora.SharedLoRA(8, shared="b")}
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)
    shared: str = choice("a", "b")

    networks = ("a b",)

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        shared = LoRA.factors[self.shared].replace("*stack", "*layers")
        return {**LoRA.factors, self.shared: shared}

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        if self.shared == "a":
            return pair_initializers(None, None, True, site)
        return {"a": zeros, "b": normal(1.0) if site.is_lookup else kaiming_of_outputs}
