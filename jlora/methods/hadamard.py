"""Hadamard: elementwise products of several low-rank terms, whose ranks multiply."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import initializers, tiling
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
from jlora.methods._common.initializers import Initializer
from jlora.methods._common.matrices import in_out
from jlora.methods._common.networks import add_matrix, add_network


@final
@dataclasses.dataclass(frozen=True)
class Hadamard(Method):
    """Adds the elementwise product of k low-rank terms, each of rank r' = rank / k.

        W + s T_1 * ... * T_k,    s = alpha / rank,    Aj: (*stack, *in, r'),    Bj: (*stack, r', *out)

        of="lora":      T_j = Aj Bj.  The product is A B with the columns of A the products of one column of each Aj
                        (Khatri-Rao), so it costs a LoRA of rank r'^k.
        of="additive":  T_j = Aj [I ... I] + [I; ...; I] Bj, multiplied out into a product of rank
                        2 r' + (2^k - 2) r'^2 as long as that is cheaper than dense.
        of="tanh":      T_j = tanh(Aj Bj), a dense update of any rank.
        of="sigmoid":   T_j = sigmoid(Aj Bj), dense; the initial value is subtracted.

    At initialisation exactly one term is zero (with two or more every gradient would be), so the program is the base.

    Arguments:
        rank: k r', the width of all terms together.
        k: the number of terms.
        of: the form of a term, "lora", "additive", "tanh" or "sigmoid".
        alpha: the numerator of the scale; None makes the scale 1.
        rank_stabilized: divides alpha by sqrt(rank) instead of rank.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: if k does not divide the rank, and from `jlora.init`, if the terms do not fit the weight.

    Hyeon-Woo et al. 2021, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning,
    arXiv:2108.06098; "additive", more than two terms and sigmoid: the library MoreLoRA (tic-top, 2023).
    """

    rank: int = positive_integer(8)
    k: int = positive_integer(2)
    of: str = choice("lora", "additive", "tanh", "sigmoid")
    alpha: float | None = nonzero(None)
    rank_stabilized: bool = switch(False)
    dropout: float = fraction(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of == "sigmoid":
            object.__setattr__(self, "offset", True)
        if self.rank % self.k:
            would = nearest_multiples(self.rank, self.k)
            raise ValueError(f"Hadamard's k = {self.k} does not divide its rank {self.rank}; rank {would} would do.")

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.rank_stabilized)

    @property
    def part(self) -> int:
        """The rank of each term."""
        return self.rank // self.k

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        n_in, n_out = in_out(site)
        if self.part > min(n_in, n_out):
            return f"rank / k = {self.part} is above the smaller of its in size {n_in} and out size {n_out}"
        if self.dropout and self._is_dense(n_in, n_out):
            return "its update would be dense here, and dropout needs a branch; lower rank or k, or set dropout to 0"
        return tiling.unsupported_reason(site, self.part, "rank / k =") if self.of == "additive" else ""

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return {
            name: declared
            for j in range(self.k)
            for name, declared in ((f"a{j}", "*stack *in part"), (f"b{j}", "*stack part *out"))
        }

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        zeros, normal = initializers.zeros, initializers.normal
        if self.of == "additive":  # each entry of the terms that are not zero is about one
            pair, last = (normal(0.5**0.5), normal(0.5**0.5)), (zeros, zeros)
        else:
            pair, last = (normal(1.0), normal(1 / math.sqrt(self.part))), (initializers.kaiming, zeros)
        pairs = [last if j == self.k - 1 else pair for j in range(self.k)]
        return {name: init for j, (a, b) in enumerate(pairs) for name, init in ((f"a{j}", a), (f"b{j}", b))}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        stack = update.axes.sizes("*stack")
        downs = [update[f"a{j}"].reshape(*stack, n_in, self.part) for j in range(self.k)]
        ups = [update[f"b{j}"].reshape(*stack, self.part, n_out) for j in range(self.k)]
        scale = self.scale * update.scale
        if self._is_dense(n_in, n_out):
            values = (self._term(a, b) for a, b in zip(downs, ups, strict=True))
            return add_matrix(w, update, functools.reduce(jnp.multiply, values), scale)
        if self.of == "additive":
            down, up = tiling.product(downs, ups)
        else:
            down, up = functools.reduce(tiling.every_column, downs), functools.reduce(tiling.every_row, ups)
        return add_network(w, update, [(down, "*stack *in joint_rank"), (up, "*stack joint_rank *out")], scale)

    def _joint_rank(self) -> int:
        """The rank of the product of all terms as one pair of matrices."""
        return self.part**self.k if self.of == "lora" else 2 * self.part + (2**self.k - 2) * self.part**2

    def _is_dense(self, n_in: int, n_out: int) -> bool:
        return self.of in ("tanh", "sigmoid") or self._joint_rank() * (n_in + n_out) >= n_in * n_out

    def _term(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The value of one term, `(*stack, in, out)`."""
        if self.of == "additive":
            wide = jnp.tile(a, (*[1] * (a.ndim - 1), b.shape[-1] // self.part))
            return wide + jnp.tile(b, (*[1] * (b.ndim - 2), a.shape[-2] // self.part, 1))
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return product if self.of == "lora" else jnp.tanh(product) if self.of == "tanh" else jax.nn.sigmoid(product)
