"""LoKr: a Kronecker product."""

import dataclasses
import math
from collections.abc import Mapping, Set
from typing import final

from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.division import split_group, splits_evenly
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import (
    choice,
    fraction,
    integer,
    nonzero,
    optional,
    positive_integer,
    scale_of,
    switch,
)
from jlora.methods._common.initializers import kaiming, zeros
from jlora.methods._common.networks import add_network, group_labels


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
        factor: the size that a and c should have; -1 stands for the square root. A size that it divides is split into
            `factor` and the rest, the smaller first; any other takes the largest divisor up to `factor` and up to its
            square root, as in LyCORIS.
        decompose_both: gives C low rank too, if the rank is less than half of its larger side.
        dropout: the dropout rate of the branch's input, in [0, 1).
        split: how factors above the square root split a size. "lycoris" is the rule above; "peft" puts a factor that
            divides the size first even if it is the larger one, as PEFT does; "divisor" takes the largest divisor up to
            `factor`, as in adapters that were saved without this field. Up to the square root, and for -1, all are
            alike.

    Yeh et al. 2023, arXiv:2309.14859; Edalati et al. 2022, KronA, arXiv:2212.10650.
    """

    rank: int | None = optional(positive_integer(8))
    alpha: float | None = nonzero(None)
    factor: int = integer(-1)
    decompose_both: bool = switch(False)
    dropout: float = fraction(0.0)
    split: str = choice("lycoris", "peft", "divisor")

    earlier_values = {"split": "divisor"}
    initializers = {"c": kaiming, "ca": kaiming, "cb": kaiming, "a": kaiming, "b": zeros, "d": zeros}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1 and self.factor != -1:
            raise ValueError(f"LoKr's factor is a positive integer, or -1 for the square root, not {self.factor}.")
        if self.factor == -1:
            object.__setattr__(self, "split", "lycoris")

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
        return split_size(n, self.factor, self.split, {k for k in _divisors(n) if splits_evenly(sizes, n // k)})

    def _is_low(self, rows: int, columns: int) -> bool:
        return self.rank is not None and self.rank < max(rows, columns) / 2


def split_size(n: int, factor: int, rule: str, majors: Set[int] | None = None) -> tuple[int, int]:
    """A size as (major, minor).

    Arguments:
        n: the size.
        factor, rule: LoKr's `factor` and `split`.
        majors: the divisors of n that may be the major size; None for all.
    """
    majors = _divisors(n) if majors is None else majors
    if factor != -1 and rule != "divisor" and n % factor == 0:
        major = factor if rule == "peft" else min(factor, n // factor)
        if major in majors:
            return major, n // major
    most = math.isqrt(n) if factor == -1 else factor if rule == "divisor" else min(factor, math.isqrt(n))
    major = max(k for k in majors if k <= most)
    return major, n // major


def _divisors(n: int) -> set[int]:
    small = {k for k in range(1, math.isqrt(n) + 1) if n % k == 0}
    return small | {n // k for k in small}
