"""Hadamard: elementwise products of several low-rank terms, whose ranks multiply."""

import dataclasses
import functools
import math
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import initializers as _start
from jlora.methods._common import tiling as _repeat


@final
@dataclasses.dataclass(frozen=True)
class Hadamard(Method):
    """Adds the elementwise product of k low-rank terms, each of rank r' = rank / k.

        W + s T_1 * ... * T_k,    s = alpha / rank,    Aj: (*stack, *in, r'),    Bj: (*stack, r', *out)

        of="lora":      T_j = Aj Bj.  The product is A B with the columns of A the products of one column of each Aj
                        (Khatri-Rao), so it costs a LoRA of rank r'^k.
        of="additive":  T_j = Aj [I ... I] + [I; ...; I] Bj, multiplied out into a product of rank
                        2 r' + (2^k - 2) r'^2 while that is cheaper than dense.
        of="tanh":      T_j = tanh(Aj Bj), a dense update of any rank.
        of="sigmoid":   T_j = sigmoid(Aj Bj), dense; the start is subtracted.

    At the start exactly one term is zero (with two or more every gradient would be), so the program is the base.

    Arguments:
        rank: k r', the width of all terms together.
        k: the number of terms.
        of: what a term is, "lora", "additive", "tanh" or "sigmoid".
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Raises:
        ValueError: where k does not divide the rank, and from `jlora.init`, where the terms do not fit the weight.

    Hyeon-Woo et al. 2021, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning,
    arXiv:2108.06098; "additive", more than two terms and sigmoid: the library MoreLoRA (tic-top, 2023).
    """

    rank: int = 8
    k: int = 2
    of: str = "lora"
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.choice(self, "lora", "additive", "tanh", "sigmoid", of=self.of)
        if self.of == "sigmoid":
            object.__setattr__(self, "offset", True)
        if self.rank % self.k:
            low = self.rank // self.k * self.k
            would = ", ".join(str(r) for r in (low, low + self.k) if r)
            raise ValueError(f"Hadamard's k = {self.k} does not divide its rank {self.rank}; rank {would} would do.")

    @property
    def part(self) -> int:
        return self.rank // self.k

    def _rank(self) -> int:
        """Of the product of LoRAs, or of additive terms, as one pair of matrices."""
        return self.part**self.k if self.of == "lora" else 2 * self.part + (2**self.k - 2) * self.part**2

    def _is_dense(self, n_in: int, n_out: int) -> bool:
        return self.of in ("tanh", "sigmoid") or self._rank() * (n_in + n_out) >= n_in * n_out

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        n_in, n_out = _axes.counts(site)
        if self.part > min(n_in, n_out):
            return f"rank / k = {self.part} is above the smaller of its in size {n_in} and out size {n_out}"
        if self.dropout and self._is_dense(n_in, n_out):
            return "its update would be dense here, and dropout needs a branch; lower rank or k, or set dropout to 0"
        return _repeat.unsupported_reason(site, self.part, "rank / k =") if self.of == "additive" else ""

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack, inner, outer = (site.sizes(role) for role in ("stack", "in", "out"))
        n_in, n_out = _axes.counts(site)
        arrays = {}
        for j in range(self.k):
            a_key, b_key = jax.random.split(jax.random.fold_in(key, j))
            last = j == self.k - 1
            if self.of == "additive":  # each entry of the other terms is about one
                a_init = b_init = _start.zeros if last else _start.normal(0.5**0.5)
            else:
                a_init = _start.kaiming if last else _start.normal(1.0)
                b_init = _start.zeros if last else _start.normal(1 / math.sqrt(self.part))
            a = _start.stacked(a_init, a_key, stack, (n_in, self.part), dtype)
            b = _start.stacked(b_init, b_key, stack, (self.part, n_out), dtype)
            arrays |= {f"a{j}": a.reshape(*stack, *inner, -1), f"b{j}": b.reshape(*stack, -1, *outer)}
        return arrays

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        sizes = [w.index(c).size for c in stack]
        n_in, n_out = w.size(inner), w.size(outer)
        downs = [update[f"a{j}"].reshape(*sizes, n_in, self.part) for j in range(self.k)]
        ups = [update[f"b{j}"].reshape(*sizes, self.part, n_out) for j in range(self.k)]
        scale = _check.scale(self.alpha, self.rank, self.rank_stabilized) * update.scale
        if self._is_dense(n_in, n_out):
            terms = (self._term(a, b) for a, b in zip(downs, ups, strict=True))
            return _axes.add_matrix(w, functools.reduce(jnp.multiply, terms), update.roles, scale)
        if self.of == "additive":
            down, up = _repeat.product(downs, ups)
        else:
            down, up = functools.reduce(_repeat.every_column, downs), functools.reduce(_repeat.every_row, ups)
        rank = _axes.ranks(w)
        pairs = [(down, stack + inner + rank), (up, stack + rank + outer)]
        return _axes.add(w, pairs, {rank: up.shape[-2]}, scale, **_axes.dropout(update, stack))

    def _term(self, a: jax.Array, b: jax.Array) -> jax.Array:
        if self.of == "additive":
            wide = jnp.tile(a, (*[1] * (a.ndim - 1), b.shape[-1] // self.part))
            return wide + jnp.tile(b, (*[1] * (b.ndim - 2), a.shape[-2] // self.part, 1))
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return product if self.of == "lora" else jnp.tanh(product) if self.of == "tanh" else jax.nn.sigmoid(product)


@final
@dataclasses.dataclass(frozen=True)
class LoHa(Method):
    """Adds the elementwise product of two low-rank matrices of the same rank: LoHa, as LyCORIS and PEFT define it.

        W + s (A0 B0) * (A1 B1),    Aj: (*stack, *in, rank),    Bj: (*stack, rank, *out),    s = alpha / rank

    Its rank is up to rank^2, and so is its cost; it is `Hadamard(2 * rank, k=2)` with a scale of its own.

    Arguments:
        rank: the rank of each of the two.
        alpha: the numerator of the scale; None makes the scale 1.
        dropout: the share of the branch's input that is dropped in training, in [0, 1).

    Yeh et al. 2023, Navigating Text-To-Image Customization, arXiv:2309.14859; Hyeon-Woo et al. 2021, arXiv:2108.06098.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    @property
    def product(self) -> Hadamard:
        alpha = None if self.alpha is None else 2 * self.alpha
        return Hadamard(2 * self.rank, 2, "lora", alpha, dropout=self.dropout)

    def unsupported_reason(self, site: Site) -> str:
        return self.product.unsupported_reason(site)

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        return self.product.init(key, site, dtype, base)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        return self.product.lower(update, w)
