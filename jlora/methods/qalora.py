"""QA-LoRA: a LoRA that is constant along groups of inputs, for the minima of a quantised weight."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.division import split_group, splits_evenly
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.matrices import nearest, rank_too_high
from jlora.methods._common.networks import add_network, group_labels


@final
@dataclasses.dataclass(frozen=True)
class QALoRA(Method):
    """Adds a product of two thin matrices whose rows are equal inside each group of inputs.

        W_ij + s (A B)_g(i)j,    g(i) = i // group,    A: (*stack, in / group, rank),    B: (*stack, rank, *out)

    with s = alpha / rank: a LoRA of the inputs that are summed over each group. A weight that is quantised with a scale
    and a minimum for each group takes this update in its minima alone: `jlora.merge(..., requantize=True)` keeps codes
    and scales of GGUF's Q4_1 (groups of 32, or multiples of it).

    Arguments:
        rank: the rank of the update.
        group: how many neighbouring inputs share a row of A: a multiple of the quantised format's block.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if the group does not divide the inputs.

    Example:
        jlora.init(key, sites, jlora.QALoRA(rank=8, group=32))

    PEFT multiplies by in / group where the paper has group; its files are read and written with that factor.

    Xu et al. 2023, QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, arXiv:2309.14717.
    """

    rank: int = positive_integer(8)
    group: int = positive_integer(32)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)

    factors = {"a": "*stack pool rank", "b": "*stack rank *out"}
    initializers = {"a": kaiming, "b": zeros}

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        axes = WeightAxes.of(site)
        if axes.axes("*window"):
            return "it is the kernel of a convolution, whose window has no groups of inputs; LoRA adapts it"
        n_in, sizes = axes.count("*in"), axes.sizes("*in")
        if n_in % self.group or not splits_evenly(sizes, self.group):
            would = nearest(self.group, n_in, lambda n: n_in % n == 0 and splits_evenly(sizes, n))
            return f"group {self.group} does not divide its in axes {sizes} into equal groups; {would} would do"
        return rank_too_high(site, self.rank)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"pool": axes.count("*in") // self.group}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        w, pool, member = split_group(w, group_labels(w, update)["*in"], self.group)
        # A with its rows repeated: a sum over each group of inputs would be one more pass, with a copy of the input.
        a = update["a"]
        rows = jnp.broadcast_to(a[..., None, :], (*a.shape[:-1], self.group, a.shape[-1]))
        labels = group_labels(w, update) | {"pool": pool, "row": member}
        terms = [(rows, "*stack pool row rank"), (update["b"], self.factors["b"])]
        return add_network(w, update, terms, self.scale * update.scale, labels)
