"""RoAd: scaled rotations of pairs of out axes."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight, AxisMap, fresh_indices
from jlora.methods._base import Method, Update
from jlora.methods._common.division import split_group, splits_evenly
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import positive_integer
from jlora.methods._common.initializers import ones, zeros
from jlora.methods._common.matrices import in_out, nearest
from jlora.methods._common.networks import add_map, group_labels, map_axes


@final
@dataclasses.dataclass(frozen=True)
class RoAd(Method):
    """Rotates and scales pairs of a weight's columns: elementwise products of the output, and no matrix product.

        [y0, y1] = [a11 cos(t11) x0 - a12 sin(t12) x1,    a21 sin(t21) x0 + a22 cos(t22) x1]

    The angles t are zero and the scales a are one at the start. Entry k of a group meets entry k + group / 2. The paper
    has pairs of neighbours, which is a group of 2; halves of larger groups, as in PEFT, are faster on most devices. In
    PEFT the bias is rotated with the output; here a bias is a parameter of its own.

    Arguments:
        variant: how many angles and scales a pair has: 1 for all entries of its matrix, 2 for the entries of an output
            each, or 4 for every entry.
        group: the size of the groups, an even number that divides the weight's joint out size.

    Liao et al. 2024, 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability,
    arXiv:2409.00119.
    """

    variant: int = positive_integer(1)
    group: int = positive_integer(2)

    factors = {"theta": "*stack groups numbers", "alpha": "*stack groups numbers"}
    initializers = {"theta": zeros, "alpha": ones}
    is_multiplicative = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in (1, 2, 4):
            raise ValueError(f"RoAd's variant is 1, 2 or 4, not {self.variant}.")
        if self.group % 2:
            even = " or ".join(str(n) for n in (self.group - 1, self.group + 1) if n)
            raise ValueError(f"RoAd's group is even, since it consists of pairs: {even} would do, not {self.group}.")

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"groups": axes.count("*out") // self.group, "numbers": self.variant * self.group // 2}

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        _, n_out = in_out(site)
        if n_out % self.group == 0:
            return ""
        would = nearest(self.group, n_out, lambda n: n % 2 == n_out % n == 0)
        return f"group {self.group} does not divide its out size {n_out}; {would} would do"

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        matrices = self._matrices_of(update)
        labels, half = group_labels(w, update), self.group // 2
        sizes = [w.size(c) for c in labels["*out"]]
        if not (splits_evenly(sizes, self.group) and splits_evenly(sizes, half)):
            identity = jnp.eye(half, dtype=matrices.dtype)
            blocks = jnp.einsum("...hij,hk->...ihjk", matrices, identity, precision="highest")
            return map_axes(w, update, blocks.reshape(*matrices.shape[:-3], self.group, self.group), "*out")
        w, groups, part = split_group(w, labels["*out"], self.group)
        w, pair, rest = split_group(w, part, half)
        old = fresh_indices([w.used()], len(pair))
        indices = labels["*stack"] + groups + rest + pair
        array = matrices.reshape([w.size(c) for c in indices + pair])
        return add_map(w, AxisMap(array, indices + old, pair, old))

    def rotate(self, update: Update, vectors: jax.Array) -> jax.Array:
        """Vectors of outputs after the rotation, for a bias that is to follow its weight.

        Arguments:
            update: the update, with this method.
            vectors: (*stack, *out).
        """
        matrices = self._matrices_of(update)
        pairs = vectors.reshape(*matrices.shape[:-3], 2, self.group // 2)
        return jnp.einsum("...hij,...jh->...ih", matrices, pairs, precision="highest").reshape(vectors.shape)

    def _matrices_of(self, update: Update) -> jax.Array:
        theta, alpha = update["theta"] * update.scale, 1 + update.scale * (update["alpha"] - 1)
        return _matrices(theta, alpha, self.variant)


def _matrices(theta: jax.Array, alpha: jax.Array, variant: int) -> jax.Array:
    """The matrix of every pair, (*stack, groups, group / 2, 2, 2), from arrays (*stack, groups, numbers)."""
    cosine, sine = alpha * jnp.cos(theta), alpha * jnp.sin(theta)
    cosine, sine = (a.reshape(*a.shape[:-1], variant, -1) for a in (cosine, sine))
    first, second = {1: (0, 0), 2: (0, 1), 4: (0, 1)}[variant]
    shift = 2 if variant == 4 else 0  # the sines have numbers of their own
    rows = [cosine[..., first, :], -sine[..., first + shift, :], sine[..., second + shift, :], cosine[..., second, :]]
    return jnp.stack(rows, axis=-1).reshape(*rows[0].shape, 2, 2)
