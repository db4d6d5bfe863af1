"""GraLoRA: a separate low-rank product for every block of the weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.division import has_equal_parts, split_group
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, nearest_multiples, nonzero, positive_integer, scale_of
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.matrices import nearest
from jlora.methods._common.networks import add_network, group_labels


def _kaiming_blocks(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Kaiming-uniform matrices `(in / k, rank / k)`, one for every block."""
    in_blocks, rows, out_blocks, part = shape
    matrix = kaiming(key, (rows, in_blocks * out_blocks * part), dtype)
    return matrix.reshape(rows, in_blocks, out_blocks, part).swapaxes(0, 1)


@final
@dataclasses.dataclass(frozen=True)
class GraLoRA(Method):
    """Divides a weight into k x k blocks and adds a product of rank (rank / k) to each.

        W_ij + s A_ij B_ij,    A_ij: (in / k, rank / k),    B_ij: (rank / k, out / k),    s = alpha / rank

    It has as many parameters as a LoRA of the same rank, and an update of rank up to k rank. B starts at zero.

    Arguments:
        rank: k times the rank of each block.
        k: the number of blocks along the joint in axis and along the joint out axis, a divisor of both and of the rank.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: if k does not divide the rank, and from `jlora.init`, if it does not divide the weight's axes.

    Example:
        jlora.init(key, sites, jlora.GraLoRA(rank=32, k=2))

    Jung et al. 2025, GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, arXiv:2505.20355.
    """

    rank: int = positive_integer(32)
    k: int = positive_integer(2)
    alpha: float | None = nonzero(None)
    dropout: float = fraction(0.0)

    factors = {
        "a": "*stack in_block in_row out_block part",
        "b": "*stack in_block out_block part out_column",
    }
    initializers = {"a": _kaiming_blocks, "b": zeros}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.k:
            would = nearest_multiples(self.rank, self.k)
            raise ValueError(f"GraLoRA's k = {self.k} does not divide its rank {self.rank}; rank {would} would do.")

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank)

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        axes = WeightAxes.of(site)
        if axes.axes("*window"):
            return "it is the kernel of a convolution, whose window has no blocks; LoRA or LoCon adapts it"
        sides = {side: axes.sizes(f"*{side}") for side in ("in", "out")}

        def fits(k: int) -> bool:
            return self.rank % k == 0 and all(has_equal_parts(sizes, k) for sizes in sides.values())

        for side, sizes in sides.items():
            if not has_equal_parts(sizes, self.k):
                would = nearest(self.k, self.rank, fits)
                return f"k = {self.k} does not divide its {side} axes {sizes} into equal blocks; {would} would do"
        part, smaller = self.rank // self.k, min(axes.count("*in"), axes.count("*out")) // self.k
        return f"rank / k = {part} is above the smaller side {smaller} of a block" if part > smaller else ""

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {
            "in_block": self.k,
            "in_row": axes.count("*in") // self.k,
            "out_block": self.k,
            "out_column": axes.count("*out") // self.k,
            "part": self.rank // self.k,
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        sizes, labels = self.sizes(update.axes), group_labels(w, update)
        w, in_block, in_row = split_group(w, labels["*in"], sizes["in_row"])
        w, out_block, out_column = split_group(w, labels["*out"], sizes["out_column"])
        blocks = {"in_block": in_block, "in_row": in_row, "out_block": out_block, "out_column": out_column}
        terms = [(update[name], declared) for name, declared in self.factors.items()]
        return add_network(w, update, terms, self.scale * update.scale, group_labels(w, update) | blocks)
