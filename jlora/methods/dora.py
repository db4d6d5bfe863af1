"""DoRA: direction by LoRA, magnitude by a vector of its own."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import Initializer

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import norms as _norm
from jlora.methods.lora import LoRA


@final
@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """Trains the magnitude of each of a weight's columns apart from its direction.

        (|W| + m) (W + s A B) / |W + s A B|,    |.| the norm over the in axes,    m: (*stack, *out), zero at the start

    m is what the magnitude has gained since the start. The norm below counts as a constant in the gradient (section
    4.3 of the paper), and is computed as |W|^2 + 2 <W, s A B> + |s A B|^2: the product A B is never formed.

    Arguments:
        rank, alpha, rank_stabilized, dropout, a_init, b_init: as for `LoRA`.

    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    a_init: Initializer | None = None
    b_init: Initializer | None = None

    depends_on_weight = True
    is_multiplicative = True

    @property
    def direction(self) -> LoRA:
        return LoRA(self.rank, self.alpha, self.rank_stabilized, self.dropout, self.a_init, self.b_init)

    def unsupported_reason(self, site: Site) -> str:
        return self.direction.unsupported_reason(site)

    def without_init_fields(self) -> "DoRA":
        return dataclasses.replace(self, a_init=None, b_init=None)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        start = jnp.zeros((*site.sizes("stack"), *site.sizes("out")), dtype)
        return {**self.direction.init(key, site, dtype, base), "m": start}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        moved = self.direction.lower(update, w)
        stack, _, outer = _axes.letters(w, update.roles)
        before, after = (lax.stop_gradient(_norm.norm(f, stack + outer)) for f in (w, moved))
        m = update["m"].reshape(before.shape).astype(before.dtype) * jnp.asarray(update.scale, before.dtype)
        return _axes.multiply(moved, (before + m) / after, stack + outer)
