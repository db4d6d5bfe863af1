"""MiSS: one thin matrix, repeated along the in axes."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import tiling as _repeat


@final
@dataclasses.dataclass(frozen=True)
class MiSS(Method):
    """Adds one thin matrix, repeated along the weight's in axes.

        W + [I; ...; I] B,    B: (*stack, rank, *out), zero at the start

    The input is summed in strides of the rank, by a product with the identities, and then multiplied.

    Arguments:
        rank: the height of B, a divisor of the weight's joint in size.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Kang and Yin 2024, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure,
    arXiv:2409.15371.
    """

    rank: int = 64
    dropout: float = 0.0

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or _repeat.unsupported_reason(site, self.rank, "rank", both=False)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        return {"b": jnp.zeros((*site.sizes("stack"), self.rank, *site.sizes("out")), dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        rank = _axes.ranks(w)
        rows = _repeat.identities(self.rank, w.size(inner), update["b"].dtype)
        pairs = [(rows, inner + rank), (update["b"], stack + rank + outer)]
        return _axes.add(w, pairs, {rank: self.rank}, update.scale, **_axes.dropout(update, stack))
