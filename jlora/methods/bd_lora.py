"""BD-LoRA: a LoRA one of whose factors is block-diagonal, so that tensor parallelism sends nothing more for it."""

import dataclasses
from collections.abc import Mapping
from typing import final

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.division import has_equal_parts, split_group
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import (
    choice,
    fraction,
    nearest_multiples,
    nonzero,
    positive_integer,
    scale_of,
    switch,
)
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.matrices import nearest, rank_too_high
from jlora.methods._common.networks import add_network, group_labels


@final
@dataclasses.dataclass(frozen=True)
class BDLoRA(Method):
    """Adds a product of two thin matrices, one of them block-diagonal along the axes that devices divide.

        W + s A B,    side="out": B = diag(B_1, ..., B_blocks)
                      side="in":  A = diag(A_1, ..., A_blocks)

    with s = alpha / rank. Take side="out" for a weight whose out axes lie along a mesh axis of `blocks` devices (query,
    key, value, up), and side="in" for one whose in axes do (attention output, down). `jlora.shardings` then puts each
    block on the device that has its part of the weight: so all that the devices exchange for the branch is part of
    what they exchange for the weight.

    Arguments:
        rank: the rank of the update, a multiple of `blocks`.
        blocks: the number of blocks: the number of devices along that axis of the mesh, or a multiple of it.
        side: the side of the weight that the devices divide, "out" or "in".
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: if `blocks` does not divide the rank, and from `jlora.init`, if it does not divide the weight.

    Example:
        targets = {".*/(query|key|value|up)/kernel": jlora.BDLoRA(16, blocks=8),
                   ".*/(out|down)/kernel": jlora.BDLoRA(16, blocks=8, side="in")}

    Wang et al. 2025, Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving,
    arXiv:2510.23346.
    """

    rank: int = positive_integer(16)
    blocks: int = positive_integer(4)
    side: str = choice("out", "in")
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)

    initializers = {"a": kaiming, "b": zeros}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.blocks:
            would = nearest_multiples(self.rank, self.blocks)
            raise ValueError(
                f"BDLoRA's {self.blocks} blocks do not divide its rank {self.rank}; rank {would} would do."
            )

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        axes = WeightAxes.of(site)
        if axes.axes("*window"):
            return "it is the kernel of a convolution; LoRA adapts it"
        sizes = axes.sizes(f"*{self.side}")
        if not has_equal_parts(sizes, self.blocks):
            would = nearest(self.blocks, self.rank, lambda n: self.rank % n == 0 and has_equal_parts(sizes, n))
            return f"{self.blocks} blocks do not divide its {self.side} axes {sizes} into equal parts; {would} would do"
        return rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        if self.side == "in":
            return {"a": "*stack block in_row part", "b": "*stack block part *out"}
        return {"a": "*stack *in block part", "b": "*stack block part out_column"}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        divided = axes.count(f"*{self.side}") // self.blocks
        return {"block": self.blocks, "in_row": divided, "out_column": divided, "part": self.rank // self.blocks}

    def divided_axes(self, axes: WeightAxes) -> Mapping[str, str]:
        return {"block": f"*{self.side}"}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        group, inner = f"*{self.side}", "in_row" if self.side == "in" else "out_column"
        w, block, rest = split_group(w, group_labels(w, update)[group], self.sizes(update.axes)[inner])
        terms = [(update[name], declared) for name, declared in update.declared.items()]
        labels = group_labels(w, update) | {"block": block, inner: rest}
        added = add_network(w, update, terms, self.scale * update.scale, labels)
        network = dataclasses.replace(added.networks[-1], in_parts=True)
        return dataclasses.replace(added, networks=(*w.networks, network))
