"""DEFT: a subspace of the weight's out space is removed, and something new put there."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import subspaces
from jlora.methods._common.hyperparameters import choice, nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import normal, stacked
from jlora.methods._common.matrices import as_matrix, in_out, rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class DEFT(Method):
    """Replaces a low-rank part of a weight.

        W + (s R - W D) P,    P: (*stack, rank, *out),    R: (*stack, *in, rank),    s = alpha / rank

        projection="relu":  D = relu(P)^T
        projection="qr":    D = P^T (P P^T)^-1, so that D P projects onto the rows of P

    R starts at W D / s, so that the program is the base. W D is a small product of the weight: as cheap as LoRA. PEFT
    writes "qr" with an orthogonal basis of the rows of P, and R in that basis; `jlora.peft` converts between the two.

    Arguments:
        rank: of the part.
        alpha: the numerator of the scale of R; None makes the scale 1.
        projection: "relu" or "qr".

    Raises:
        ValueError: from `jlora.init`, if the rank is above the weight's out or in size.

    Kumar et al. 2025, DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, arXiv:2509.22793.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    projection: str = choice("relu", "qr")

    factors = {"p": "*stack rank *out", "r": "*stack *in rank"}
    depends_on_weight = True

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        _, n_out = in_out(site)
        p = stacked(normal(0.02), key, site.sizes("stack"), (self.rank, n_out), jnp.float32).astype(dtype)
        r = subspaces.image(as_matrix(base, site.roles), p, self.projection) / self.scale
        return {"p": p, "r": r.astype(dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        p, r = update.joined("p"), update.joined("r")
        r = self.scale * r - subspaces.image_of(w, update, p, self.projection)
        return add_network(w, update, [(r, "*stack *in rank"), (p, "*stack rank *out")], update.scale)
