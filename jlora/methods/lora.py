"""LoRA: the low-rank update itself."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import final

import jax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora.methods._base import Method
from jlora.methods._common import initializers
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.initializers import Initializer
from jlora.methods._common.matrices import as_matrix, in_out, rank_too_high


@final
@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Adds a product of two thin matrices to a weight.

        W + s A B,    A: (*stack, *in, rank),    B: (*stack, rank, *out),    s = alpha / rank

    Axes of the weight that the program contracts belong to A, its output axes to B; a stacked weight (layers of a scan,
    experts) has one pair for each layer. At initialisation the program equals the base: one of A and B is zero, or the
    initial product is subtracted. With initialisers of your own, of which none gives zeros, set `offset=True` for that.

    Arguments:
        rank: the rank of the update, from 1 to the smaller of the weight's joint in and out sizes.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: the dropout rate of the branch's input, in [0, 1); see `jlora.with_dropout`. Rows that an embedding
            looks up are never dropped.
        a_init: initialiser of A, called with the shape `(in, rank)` for each layer of a stack. The default is
            Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in); zeros for an embedding.
        b_init: initialiser of B, called with `(rank, out)`. The default is zeros; standard normal for an embedding.
        start: instead of initialisers "gaussian", "orthogonal", or one that takes both matrices from the weight, with
            the initial product subtracted and the base unchanged: "pissa", "pissa_niter_4" (or another number of
            subspace iterations), "milora", "olora". "mica" (Rüdiger and Raschka 2026, arXiv:2604.01694) takes B from
            the weight, its last right singular vectors, and trains A alone, from zero. All that take something from the
            weight need `jlora.init(..., params=params)`.
        freeze_a: trains B alone (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
        freeze_b: trains A alone, which starts at zero; B is random, unless the start is "mica", which implies this.

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if it does not fit the weight.

    Example:
        jlora.init(key, sites, {r".*/(query|value)/kernel": jlora.LoRA(rank=8, alpha=16)})

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)
    a_init: Initializer | None = None
    b_init: Initializer | None = None
    start: str | None = None
    freeze_a: bool = switch(False)
    freeze_b: bool = switch(False)

    factors = {"a": "*stack *in rank", "b": "*stack rank *out"}
    networks = ("a b",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            if not re.fullmatch(initializers.STARTS, self.start):
                names = initializers.STARTS.replace("|", ", ").replace(r"\d+", "<number>")
                raise ValueError(
                    f"LoRA's start is one of {names}, not {self.start!r}. Starts from data or from a quantised base "
                    "are functions of an adapter: jlora.eva, jlora.corda, jlora.lora_ga, jlora.loftq."
                )
            if self.a_init or self.b_init:
                raise ValueError("LoRA takes a start or initialisers, not both.")
        if len(self.frozen) > 1:
            raise ValueError(
                "LoRA would train nothing: freeze_a with freeze_b, or with the start 'mica'. Leave one out."
            )

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("a",) * self.freeze_a + ("b",) * (self.freeze_b or self.start == "mica")

    @property
    def init_needs_weight(self) -> bool:
        return self.start == "mica" or self._starts_apart

    @property
    def _starts_apart(self) -> bool:
        """Whether A B is not zero at the start, so that it has to be subtracted."""
        return bool(re.fullmatch(initializers.FROM_BASE, self.start or ""))

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def without_init_fields(self) -> "LoRA":
        changes = {"offset": self.offset or self._starts_apart, "freeze_b": "b" in self.frozen}
        return dataclasses.replace(self, a_init=None, b_init=None, start=None, **changes)

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        if self.freeze_b:
            random = initializers.normal(1.0) if site.is_lookup else initializers.kaiming_of_outputs
            return {"a": self.a_init or initializers.zeros, "b": self.b_init or random}
        return pair_initializers(self.a_init, self.b_init, self.freeze_a, site)

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        if not self.start:
            return super().init(key, site, dtype, base)
        weight = None if base is None else as_matrix(base, site.roles)
        shape = (*site.sizes("stack"), *in_out(site))
        a, b = initializers.named_start(self.start, key, weight, shape, self.rank)
        if self._starts_apart and self.scale != 1:
            a, b = (factor / math.sqrt(self.scale) for factor in (a, b))
        return {"a": a.astype(dtype), "b": b.astype(dtype)}


def pair_initializers(
    a_init: Initializer | None, b_init: Initializer | None, freeze_a: bool, site: Site
) -> dict[str, Initializer]:
    """How A and B start: A random and B zero; in an embedding, whose A is looked up, the other way round."""
    normal, zeros = initializers.normal(1.0), initializers.zeros
    is_swapped = site.is_lookup and not freeze_a
    down = zeros if is_swapped else normal if site.is_lookup else initializers.kaiming
    return {"a": a_init or down, "b": b_init or (normal if is_swapped else zeros)}
