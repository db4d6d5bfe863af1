"""LoRA: the low-rank update itself."""

import dataclasses
import math
from typing import Any, final

import jax
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from jlora._factored import Factored, Network, fresh
from jlora._method import Method, Update
from jlora._site import Site


@final
@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Adds a product of two thin matrices to a weight.

        W + s A B,    A: (*stack, *in, rank),    B: (*stack, rank, *out),    s = alpha / rank

    Axes of the weight that the program contracts belong to A, those that it hands on to B; a stacked weight
    (layers of a scan, experts) has one pair a layer. At the start one of A and B is zero, so the program is the base.

    Arguments:
        rank: the rank of the update, from 1 to the smaller of the weight's joint in and out sizes.
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: the share of the branch's input that is dropped in training, in [0, 1); see `jlora.with_dropout`.
            Rows that an embedding looks up are never dropped.
        a_init: initialiser of A, called with the shape `(in, rank)` for each layer of a stack. The default is
            Kaiming-uniform with a = sqrt(5), that is uniform in +-1/sqrt(in); zeros for an embedding.
        b_init: initialiser of B, called with `(rank, out)`. The default is zeros; standard normal for an embedding.

    Raises:
        ValueError: from `jlora.init`, where the rank does not fit the weight.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    a_init: Initializer | None = None
    b_init: Initializer | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"LoRA's rank is a whole number from 1 on, not {self.rank!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA's dropout is a share in [0, 1), not {self.dropout!r}.")

    @property
    def scale(self) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def refusal(self, site: Site) -> str:
        if site.refusal or self.rank <= site.max_rank:
            return site.refusal
        n_in, n_out = math.prod(site.sizes("in")), math.prod(site.sizes("out"))
        return f"rank {self.rank} is above the smaller of its in size {n_in} and out size {n_out}; lower the rank"

    def settled(self) -> "LoRA":
        return dataclasses.replace(self, a_init=None, b_init=None)

    def init(self, key: jax.Array, site: Site, dtype: Any) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        a, b = self._matrices(key, stack, math.prod(inner), math.prod(outer), site.is_lookup, dtype)
        return {"a": a.reshape(*stack, *inner, self.rank), "b": b.reshape(*stack, self.rank, *outer)}

    def _matrices(
        self, key: jax.Array, stack: tuple[int, ...], n_in: int, n_out: int, lookup: bool, dtype: Any
    ) -> tuple[Float[Array, "*stack {n_in} {self.rank}"], Float[Array, "*stack {self.rank} {n_out}"]]:
        kaiming = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        zeros, normal = jax.nn.initializers.zeros, jax.nn.initializers.normal(1.0)
        a_key, b_key = jax.random.split(key)
        a = stacked(self.a_init or (zeros if lookup else kaiming), a_key, stack, (n_in, self.rank), dtype)
        b = stacked(self.b_init or (normal if lookup else zeros), b_key, stack, (self.rank, n_out), dtype)
        return a, b

    def lower(self, update: Update, w: Factored) -> Factored:
        stack, inner, outer = (
            "".join(a for a, r in zip(w.axes, update.roles, strict=True) if r == role)
            for role in ("stack", "in", "out")
        )
        rank = fresh(w.used())
        network = Network(
            factors=(update.factors["a"], update.factors["b"]),
            terms=(stack + inner + rank, stack + rank + outer),
            scale=self.scale * update.scale,
            key=update.key,
            key_term=stack if update.key is not None else "",
            rate=self.dropout,
        )
        return dataclasses.replace(w, networks=(*w.networks, network))


def stacked(
    init: Initializer, key: jax.Array, stack: tuple[int, ...], shape: tuple[int, int], dtype: Any
) -> Float[Array, "*stack {shape[0]} {shape[1]}"]:
    """An initialiser's matrices, one with a key of its own for each layer of a stack."""
    if not stack:
        return init(key, shape, dtype)
    keys = jax.random.split(key, math.prod(stack))
    return jax.vmap(lambda k: init(k, shape, dtype))(keys)
