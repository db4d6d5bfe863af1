"""PSOFT: a rotation inside the subspace of the weight's leading singular vectors."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import rotations
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, positive_integer, switch
from jlora.methods._common.linalg import identity_like
from jlora.methods._common.matrices import as_matrix, rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class PSOFT(Method):
    """Rotates the part of a weight that its leading singular vectors span.

        W + U (diag(g) R diag(h) - I) S V^T,    R = (I - Q) (I + Q)^-1,    Q antisymmetric, rank x rank

    U: (*stack, *in, rank), S and V^T: (*stack, rank, *out) come from the weight: `jlora.init(..., params=params)`.
    Trained are the entries of Q above the diagonal, zero at the start, and the gains g and h, ones at the start.
    Without gains R is orthogonal, so angles and norms inside the subspace are kept.

    Arguments:
        rank: the number of singular vectors.
        in_gain: whether g is trained; otherwise it is one.
        out_gain: whether h is trained; otherwise it is one.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if the rank is higher than the weight's.

    Example:
        jlora.init(key, sites, jlora.PSOFT(rank=32), params=params)

    Wu et al. 2025, Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv:2505.11235.
    """

    rank: int = positive_integer(32)
    in_gain: bool = switch(True)
    out_gain: bool = switch(True)
    dropout: float = fraction(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank == 1 and not (self.in_gain or self.out_gain):
            raise ValueError("PSOFT of rank 1 without gains would train nothing: raise the rank, or set a gain.")

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a", "b")

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        gains = {"g": "*stack in_rank"} if self.in_gain else {}
        gains |= {"h": "*stack out_rank"} if self.out_gain else {}
        return {"a": "*stack *in in_rank", "q": "*stack angles", **gains, "b": "*stack out_rank *out"}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"in_rank": self.rank, "out_rank": self.rank, "angles": rotations.angles(self.rank)}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        u, s, vt = jnp.linalg.svd(as_matrix(base, site.roles), full_matrices=False)
        leading = s[..., : self.rank, None] * vt[..., : self.rank, :]
        stack, sizes = site.sizes("stack"), self.sizes(WeightAxes.of(site))
        arrays = {"a": u[..., : self.rank].astype(dtype), "b": leading.astype(dtype)}
        starts = {"q": jnp.zeros, "g": jnp.ones, "h": jnp.ones}
        for name, declared in self.factors_for(WeightAxes.of(site)).items():
            if name in starts:
                arrays[name] = starts[name]((*stack, sizes[declared.split()[-1]]), dtype)
        return arrays

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        middle = rotations.cayley(update["q"], self.rank)
        identity = identity_like(middle)
        if self.in_gain:
            middle = update["g"][..., None] * middle
        if self.out_gain:
            middle = middle * update["h"][..., None, :]
        terms = [
            (update["a"], "*stack *in in_rank"),
            (middle - identity, "*stack in_rank out_rank"),
            (update["b"], "*stack out_rank *out"),
        ]
        return add_network(w, update, terms, update.scale)
