"""HRA: a chain of Householder reflections, which is a low-rank update of the weight."""

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import initializers as _start
from jlora.methods._common.linalg import identity_like


@final
@dataclasses.dataclass(frozen=True)
class HRA(Method):
    """Multiplies a weight by a chain of Householder reflections of its in space.

        H W,    H = H_r ... H_1,    H_k = I - 2 u_k u_k^T / |u_k|^2,    U: (*stack, *in, rank)

    H is I - U T U^T with a small triangular T (Joffrain et al. 2006, doi:10.1145/1141885.1141886), so H W is W minus a
    low-rank product of U T and U^T W, and costs what LoRA does. Reflections start in equal pairs, which cancel up to
    rounding.

    Arguments:
        rank: the number of reflections, an even one.

    Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation, arXiv:2405.17484.
    """

    rank: int = 8

    depends_on_weight = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % 2:
            raise ValueError(
                f"HRA's rank is even, since reflections start in pairs: {self.rank - 1} or {self.rank + 1} would do, "
                f"not {self.rank}."
            )

    def unsupported_reason(self, site: Site) -> str:
        n_in, _ = _axes.counts(site) if not site.unsupported_reason else (0, 0)
        if site.unsupported_reason or self.rank // 2 <= n_in:
            return site.unsupported_reason
        return f"{self.rank // 2} pairs of reflections are more than its in size {n_in}; lower the rank"

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner = site.sizes("stack"), site.sizes("in")
        half = _start.stacked(_start.normal(1.0), key, stack, (_axes.counts(site)[0], self.rank // 2), dtype)
        return {"u": jnp.repeat(half, 2, axis=-1).reshape(*stack, *inner, self.rank)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        sizes = [w.index(c).size for c in stack]
        u = update["u"].reshape(*sizes, -1, self.rank)
        u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
        with jax.default_matmul_precision("highest"):
            gram = u.mT @ u
            one = identity_like(gram)
            t = lax.linalg.triangular_solve(jnp.tril(gram, -1) + 0.5 * one, one, left_side=True, lower=True)
            image = u.mT @ _axes.matrix(w, update.roles).astype(u.dtype)
            u = u @ t
        rank = _axes.ranks(w)
        pairs = [(u, stack + inner + rank), (image, stack + rank + outer)]
        return _axes.add(w, pairs, {rank: self.rank}, -update.scale)
