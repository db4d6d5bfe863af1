"""LoKr: a Kronecker product."""

import dataclasses
import math
from collections.abc import Mapping
from typing import final

from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import (
    fraction,
    integer,
    nonzero,
    optional,
    positive_integer,
    scale_of,
    switch,
)
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.networks import add_network, group_labels, split_group, splits_evenly


@final
@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """Adds a Kronecker product, the larger factor (or both) of low rank if that is smaller.

        W + s C (x) D,    C: (a, c),    D: (b, d) or A B with A: (b, rank), B: (rank, d),    in = a b,    out = c d

    With indices `ac, bd -> (a b), (c d)`; a stacked weight has one pair for each layer. Of a convolution, `in` are its
    channels, and D has the window in front, (*window, b, d), or A: (*window, b, rank). D (or B) starts at zero.

    Arguments:
        rank: the rank of D; None keeps D a full matrix. D is also a full matrix if the rank is at least half of its
            larger side.
        alpha: the numerator of the scale alpha / rank; None makes the scale 1. Without low rank the scale is 1.
        factor: the largest size of a and c, which take the divisor nearest below it; -1 stands for the square root.
        decompose_both: gives C low rank too, if the rank is less than half of its larger side.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Yeh et al. 2023, arXiv:2309.14859; Edalati et al. 2022, KronA, arXiv:2212.10650.
    """

    rank: int | None = optional(positive_integer(8))
    alpha: float | None = nonzero(None)
    factor: int = integer(-1)
    decompose_both: bool = switch(False)
    dropout: float = fraction(0.0)

    initializers = {"c": kaiming, "ca": kaiming, "cb": kaiming, "a": kaiming, "b": zeros, "d": zeros}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise ValueError(f"LoKr's factor is a positive integer, or -1 for the square root, not {self.factor}.")

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        (a, b), (c, d) = self._split(axes.sizes("*channels")), self._split(axes.sizes("*out"))
        if self.decompose_both and self._is_low(a, c):
            major = {"ca": "*stack in_major major_rank", "cb": "*stack major_rank out_major"}
        else:
            major = {"c": "*stack in_major out_major"}
        if self._is_low(b, d):
            return major | {"a": "*stack *window in_minor rank", "b": "*stack rank out_minor"}
        return major | {"d": "*stack *window in_minor out_minor"}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        (a, b), (c, d) = self._split(axes.sizes("*channels")), self._split(axes.sizes("*out"))
        sizes = {"in_major": a, "in_minor": b, "out_major": c, "out_minor": d}
        return sizes if self.rank is None else sizes | {"major_rank": self.rank}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        sizes, labels = self.sizes(update.axes), group_labels(w, update)
        w, in_major, in_minor = split_group(w, labels["*channels"], sizes["in_minor"])
        w, out_major, out_minor = split_group(w, labels["*out"], sizes["out_minor"])
        labels = group_labels(w, update) | {
            "in_major": in_major,
            "in_minor": in_minor,
            "out_major": out_major,
            "out_minor": out_minor,
        }
        terms = [(update[name], declared) for name, declared in update.declared.items()]
        is_low = len(terms) > 2  # at least one of the two is a product
        scale = scale_of(self.alpha, self.rank) if self.rank and is_low else 1.0
        return add_network(w, update, terms, scale * update.scale, labels)

    def _split(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """The joint axis of some sizes as (major, minor)."""
        n = math.prod(sizes)
        majors = [k for k in range(1, n + 1) if n % k == 0 and splits_evenly(sizes, n // k)]
        most = math.isqrt(n) if self.factor == -1 else self.factor
        major = max(k for k in majors if k <= most)
        return major, n // major

    def _is_low(self, rows: int, columns: int) -> bool:
        return self.rank is not None and self.rank < max(rows, columns) / 2
