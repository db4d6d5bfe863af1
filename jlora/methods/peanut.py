"""PEANuT: a small network that reads the weight."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice, integer, nonzero, positive_integer
from jlora.methods._common.initializers import Initializer, kaiming, zeros
from jlora.methods._common.matrices import dense_matrix, rank_too_high
from jlora.methods._common.networks import add_network

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


@final
@dataclasses.dataclass(frozen=True)
class PEANuT(Method):
    """Adds the outputs of a small neural network that is applied to each row of the weight.

        W + s D(E(f(W A))) B,    A: (*stack, *out, rank),    B: (*stack, rank, *out),    f an activation

    E is `depth` layers h -> f(h E_k), and D as many layers h -> f(h D_k) + h', with h' the input of E's layer of the
    same size, the last one first; E_k, D_k: (*stack, rank, rank). f(W A) and what follows have rank columns, and are
    computed once for all inputs: so the update is a low-rank product, which costs as much as LoRA. B starts at zero.

    Arguments:
        rank: the width of the network.
        depth: of E, and of D.
        activation: f: "relu", "gelu", "silu", "sigmoid" or "tanh".
        scaling: s.

    Zhong et al. 2024, PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, arXiv:2410.01870.
    """

    rank: int = positive_integer(32)
    depth: int = integer(0)
    activation: str = choice(*ACTIVATIONS)
    scaling: float = nonzero(1.0)

    depends_on_weight = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 0:
            raise ValueError(f"PEANuT's depth is 0 or a positive integer, not {self.depth}.")

    @property
    def scale(self) -> float:
        return self.scaling

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        layers = {"encoders": "*stack depth rank width", "decoders": "*stack depth rank width"} if self.depth else {}
        return {"a": "*stack *out rank", **layers, "b": "*stack rank *out"}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"width": self.rank}

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return {"a": kaiming, "encoders": kaiming, "decoders": kaiming, "b": zeros}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        f = ACTIVATIONS[self.activation]
        a = update.joined("a")
        with jax.default_matmul_precision("highest"):
            hidden = f(dense_matrix(w, update.roles).astype(a.dtype) @ a)  # (*stack, in, rank)
            inputs = []
            for k in range(self.depth):
                inputs.append(hidden)
                hidden = f(hidden @ update["encoders"][..., k, :, :])
            for k in range(self.depth):
                hidden = f(hidden @ update["decoders"][..., k, :, :]) + inputs.pop()
        terms = [(hidden, "*stack *in rank"), (update["b"], "*stack rank *out")]
        return add_network(w, update, terms, self.scale * update.scale)
