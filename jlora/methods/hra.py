"""HRA: a chain of Householder reflections, which is a low-rank update of the weight."""

import dataclasses
from typing import final

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.hyperparameters import positive_integer
from jlora.methods._common.initializers import normal
from jlora.methods._common.linalg import identity_like
from jlora.methods._common.matrices import dense_matrix, in_out
from jlora.methods._common.networks import add_network


def _equal_pairs(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    n_in, rank = shape
    return jnp.repeat(normal(1.0)(key, (n_in, rank // 2), dtype), 2, axis=-1)


@final
@dataclasses.dataclass(frozen=True)
class HRA(Method):
    """Multiplies a weight by a chain of Householder reflections of its in space.

        H W,    H = H_r ... H_1,    H_k = I - 2 u_k u_k^T / |u_k|^2,    U: (*stack, *in, rank)

    H is I - U T U^T with a small triangular T (Joffrain et al. 2006, doi:10.1145/1141885.1141886), so H W is W minus a
    low-rank product of U T and U^T W, and costs as much as LoRA. Reflections start in equal pairs, which cancel up to
    rounding.

    Arguments:
        rank: the number of reflections, an even one.

    Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation, arXiv:2405.17484.
    """

    rank: int = positive_integer(8)

    factors = {"u": "*stack *in rank"}
    initializers = {"u": _equal_pairs}
    depends_on_weight = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % 2:
            raise ValueError(
                f"HRA's rank is even, since reflections start in pairs: {self.rank - 1} or {self.rank + 1} would do, "
                f"not {self.rank}."
            )

    def unsupported_reason(self, site: Site) -> str:
        n_in, _ = in_out(site) if not site.unsupported_reason else (0, 0)
        if site.unsupported_reason or self.rank // 2 <= n_in:
            return site.unsupported_reason
        return f"{self.rank // 2} pairs of reflections are more than its in size {n_in}; lower the rank"

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        u = update.joined("u")
        u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
        with jax.default_matmul_precision("highest"):
            gram = u.mT @ u
            identity = identity_like(gram)
            triangle = jnp.tril(gram, -1) + 0.5 * identity
            t = lax.linalg.triangular_solve(triangle, identity, left_side=True, lower=True)
            image = u.mT @ dense_matrix(w, update.roles).astype(u.dtype)
            u = u @ t
        return add_network(w, update, [(u, "*stack *in rank"), (image, "*stack rank *out")], -update.scale)
