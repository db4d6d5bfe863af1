"""AdaMSS: a small update in each of several subspaces, which are clusters of the weight's columns."""

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
from jlora.methods._common.hyperparameters import positive_integer
from jlora.methods._common.matrices import as_matrix, in_out, rank_too_high
from jlora.methods._common.networks import add_network

_ITERATIONS = 10  # of the clustering, as in the paper's code


@final
@dataclasses.dataclass(frozen=True)
class AdaMSS(Method):
    """Clusters the outputs of a weight by its singular vectors, and adds a product of low rank to each cluster.

        W_o + P A_c(o) B_o,    A_c: (rank, subspace_rank) for each cluster,    B_o: (subspace_rank,) for each output

    P (*stack, *in, rank), the leading left singular vectors of the weight, and c(o), the cluster of output o, come from
    the weight and are frozen: `jlora.init(..., params=params)`. The clusters are those of the rows of the right
    singular vectors, by k-means. A_c starts at the leading directions of its cluster, B at zero.

    Arguments:
        rank: the number of singular vectors.
        subspaces: the number of clusters, at most the number of outputs.
        subspace_rank: the rank of the update of each cluster.

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if it does not fit the weight.

    Example:
        jlora.init(key, sites, jlora.AdaMSS(rank=64, subspaces=5), params=params)

    Zheng et al. 2025, AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025.
    """

    rank: int = positive_integer(100)
    subspaces: int = positive_integer(5)
    subspace_rank: int = positive_integer(1)

    factors = {
        "p": "*stack *in in_rank",
        "a": "*stack in_rank subspace part",
        "b": "*stack part *out",
        "c": "*stack subspace *out",
    }

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("p", "c")

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        n_out = in_out(site)[1]
        if self.subspaces > n_out:
            return f"{self.subspaces} subspaces are more than its {n_out} outputs; lower their number"
        if self.subspace_rank > self.rank:
            return f"subspace_rank {self.subspace_rank} is above the rank {self.rank}; lower it"
        return rank_too_high(site, self.rank)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"in_rank": self.rank, "subspace": self.subspaces, "part": self.subspace_rank}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        u, _, vt = jnp.linalg.svd(as_matrix(base, site.roles), full_matrices=False)
        points = vt[..., : self.rank, :].mT  # (*stack, out, rank)
        flat = points.reshape(-1, *points.shape[-2:])
        clusters = jax.vmap(lambda k, rows: _clusters(k, rows, self.subspaces))(jax.random.split(key, len(flat)), flat)
        clusters = clusters.reshape(*points.shape[:-2], *clusters.shape[-2:])  # (*stack, subspace, out)
        _, _, directions = jnp.linalg.svd(clusters[..., None] * points[..., None, :, :], full_matrices=False)
        arrays = {
            "p": u[..., : self.rank],
            "a": jnp.moveaxis(directions[..., : self.subspace_rank, :], -1, -3),
            "b": jnp.zeros((*points.shape[:-2], self.subspace_rank, points.shape[-2])),
            "c": clusters,
        }
        return {name: array.astype(dtype) for name, array in arrays.items()}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        columns = update.joined("c")[..., :, None, :] * update.joined("b")[..., None, :, :]
        terms = [
            (update["p"], self.factors["p"]),
            (update["a"], self.factors["a"]),
            (columns, "*stack subspace part *out"),
        ]
        return add_network(w, update, terms, update.scale)


def _clusters(key: jax.Array, points: jax.Array, count: int) -> jax.Array:
    """The clusters of some points by k-means, from random points: `(count, points)`, one in the cluster of each."""

    def nearest(centres: jax.Array) -> jax.Array:
        distances = jnp.sum(jnp.square(points[None] - centres[:, None]), -1)
        return jax.nn.one_hot(jnp.argmin(distances, 0), count, axis=0, dtype=points.dtype)

    def move(_: jax.Array, centres: jax.Array) -> jax.Array:
        members = nearest(centres)
        sizes = members.sum(-1, keepdims=True)
        means = jnp.matmul(members, points, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(sizes, 1)
        return jnp.where(sizes > 0, means, centres)

    start = jax.random.choice(key, points, (count,), replace=False)
    return nearest(jax.lax.fori_loop(0, _ITERATIONS, move, start))
