"""VB-LoRA: low-rank factors that are composed of the vectors of one bank, which all weights share."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, positive_integer, switch, text
from jlora.methods._common.initializers import Initializer, normal, uniform_within
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class VBLoRA(Method):
    """Adds a product of two thin matrices whose pieces are mixtures of vectors that all weights share.

        W + A B,    A[j length : (j + 1) length, r] = sum_k softmax(topk(a[j, r]))_k bank[argtopk(a[j, r])_k]

    and B alike, from its logits. a: (*stack, in / length, rank, vectors), b: (*stack, rank, out / length, vectors),
    bank: (vectors, length), shared by all weights of an adapter with an equal method; one of the updates holds it. If
    the length does not divide a side of the weight, the last piece is cut.

    A B is not zero at the start. So the initial product is subtracted by default, at the cost of twice the rank; with
    `offset=False`, as in the paper and in files of PEFT, the program does not start at the base.

    Arguments:
        rank: the rank of the update.
        vectors: how many vectors the bank has.
        length: the length of a vector.
        topk: how many vectors are mixed in each piece.
        group: a name: weights whose methods differ in it do not share.
        dropout: the dropout rate of the branch's input, in [0, 1).
        offset: whether the program equals the base at the start.

    Li, Han & Ji 2024, VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv:2405.15179.
    """

    rank: int = positive_integer(4)
    vectors: int = positive_integer(256)
    length: int = positive_integer(256)
    topk: int = positive_integer(2)
    group: str = text("")
    dropout: float = fraction(0.0)
    offset: bool = dataclasses.field(default=True, kw_only=True, metadata=switch(True).metadata)

    factors = {
        "a": "*stack in_pieces rank vectors",
        "b": "*stack rank out_pieces vectors",
        "bank": "vectors length",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.vectors:
            raise ValueError(f"VBLoRA mixes {self.topk} vectors, and the bank has {self.vectors}: lower topk.")

    @property
    def shared_arrays(self) -> tuple[str, ...]:
        return ("bank",)

    def unsupported_reason(self, site: Site) -> str:
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        n_in, n_out = axes.count("*in"), axes.count("*out")
        return {"in_pieces": -(-n_in // self.length), "out_pieces": -(-n_out // self.length)}

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        return {"a": normal(0.1), "b": normal(0.1), "bank": uniform_within(0.02)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        a = self._mixtures(update["a"].swapaxes(-3, -2), update["bank"], update.axes.count("*in"))
        b = self._mixtures(update["b"], update["bank"], update.axes.count("*out"))
        return add_network(w, update, [(a.mT, "*stack *in rank"), (b, "*stack rank *out")], update.scale)

    def _mixtures(self, logits: jax.Array, bank: jax.Array, width: int) -> jax.Array:
        """(*stack, rank, width), from logits (*stack, rank, pieces, vectors)."""
        largest, places = jax.lax.top_k(logits, self.topk)
        mixed = jnp.einsum("...k,...kl->...l", jax.nn.softmax(largest), bank[places], precision="highest")
        return mixed.reshape(*mixed.shape[:-2], -1)[..., :width]
