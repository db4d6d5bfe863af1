"""TinyLoRA: a few trained numbers for all weights, between the leading singular vectors of each."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, positive_integer, switch, text
from jlora.methods._common.matrices import as_matrix, rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class TinyLoRA(Method):
    """Trains a vector that all weights share: the coefficients of random matrices between singular vectors.

        W + U S (sum_k v_k P_k) V^T,    v: (size,), shared,    P: (*stack, size, rank, rank), random and frozen

    U S is A `(*stack, *in, rank)` and V^T is B `(*stack, rank, *out)`, the leading singular vectors of W, both frozen:
    `jlora.init(..., params=params)`. v starts at zero. All weights of an adapter with an equal method share one v, the
    layers of a stack included; one of the updates holds it.

    Files of PEFT have the singular values in both matrices, half each, and are read with the matrices that they have.

    Arguments:
        rank: the number of singular vectors.
        size: the length of v.
        tied: whether all weights share v; otherwise each weight, and each layer of a stack, has its own.
        group: a name: weights whose methods differ in it do not share.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Example:
        targets = {".*/(query|value)": jlora.TinyLoRA(size=13, group="attention"), ".*/up": jlora.TinyLoRA(size=13)}

    Morris et al. 2026, Learning to Reason in 13 Parameters, arXiv:2602.04118.
    """

    rank: int = positive_integer(2)
    size: int = positive_integer(64)
    tied: bool = switch(True)
    group: str = text("")
    dropout: float = fraction(0.0)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a", "p", "b")

    @property
    def shared_arrays(self) -> tuple[str, ...]:
        return ("v",) if self.tied else ()

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return {
            "v": "size" if self.tied else "*stack size",
            "a": "*stack *in in_rank",
            "p": "*stack size in_rank out_rank",
            "b": "*stack out_rank *out",
        }

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"in_rank": self.rank, "out_rank": self.rank}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        u, s, vt = jnp.linalg.svd(as_matrix(base, site.roles), full_matrices=False)
        shapes = self.shapes(WeightAxes.of(site))
        return {
            "v": jnp.zeros(shapes["v"], dtype),
            "a": (u[..., : self.rank] * s[..., None, : self.rank]).astype(dtype),
            "p": jax.random.normal(key, shapes["p"], dtype) / self.rank**0.5,
            "b": vt[..., : self.rank, :].astype(dtype),
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        declared = update.declared
        middle = jnp.einsum("...k,...kij->...ij", update["v"], update["p"], precision="highest")
        terms = [(update["a"], declared["a"]), (middle, "*stack in_rank out_rank"), (update["b"], declared["b"])]
        return add_network(w, update, terms, update.scale)
