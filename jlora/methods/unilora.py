"""UniLoRA: all entries of all low-rank factors from one trained vector."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora._tree.paths import path_number
from jlora.methods._base import Method, Update
from jlora.methods._common import random_matrices
from jlora.methods._common.digits import count_digits, from_digits, to_digits
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, integer, optional, positive_integer, switch, text
from jlora.methods._common.initializers import uniform_within
from jlora.methods._common.matrices import rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class UniLoRA(Method):
    """Adds a product of two thin matrices whose entries are those of one vector, which all weights share.

        W + A B,    A[i, r] = n[j] theta[j] with j = a_index[i, r],    B alike,    theta: (length,), shared

    The indices are random. n[j] = 1 / sqrt(how often all weights together have j), so that the map from theta to all
    factors keeps lengths and angles. All weights of an adapter with an equal method share theta and n; one of the
    updates holds them. The indices are drawn from the seed and the path when they are needed, and are neither kept nor
    saved. An update that was read from a file of PEFT holds its indices (`seed=None`), because that library draws them
    in the order of its modules.

    A B is not zero at the start. So the initial product is subtracted by default, at the cost of twice the rank; with
    `offset=False`, as in the paper and in files of PEFT, the program does not start at the base.

    Arguments:
        rank: the rank of the update.
        length: of theta.
        seed: of the indices; None if the update holds them.
        group: a name: weights whose methods differ in it do not share.
        dropout: the dropout rate of the branch's input, in [0, 1).
        offset: whether the program equals the base at the start.

    Li et al. 2025, Uni-LoRA: One Vector is All You Need, arXiv:2506.00799.
    """

    rank: int = positive_integer(4)
    length: int = positive_integer(256)
    seed: int | None = optional(integer(0))
    group: str = text("")
    dropout: float = fraction(0.0)
    offset: bool = dataclasses.field(default=True, kw_only=True, metadata=switch(True).metadata)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("norm", "site") if self.seed is not None else ("norm", "a_index", "b_index")

    @property
    def shared_arrays(self) -> tuple[str, ...]:
        return ("theta", "norm")

    def unsupported_reason(self, site: Site) -> str:
        if self.seed is None:
            return "its indices come from a file; pass a seed"
        return site.unsupported_reason or rank_too_high(site, self.rank)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        vectors = {"theta": "length", "norm": "length"}
        if self.seed is not None:
            return vectors | {"site": "path_digits"}
        return vectors | {"a_index": "*stack *in rank digits", "b_index": "*stack rank *out digits"}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"path_digits": 4, "digits": count_digits(self.length)}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        return {
            "theta": uniform_within(0.02)(key, (self.length,), dtype),
            "norm": jnp.ones(self.length, dtype),  # the true one depends on all weights: see `share`
            "site": jnp.asarray(to_digits(np.asarray(path_number(site.path)), 4), dtype),
        }

    def share(self, updates: Mapping[str, Update]) -> Mapping[str, Mapping[str, jax.Array]]:
        counts = jnp.zeros(self.length)
        for update in updates.values():
            for indices in self._indices(update):
                counts = counts.at[indices.reshape(-1)].add(1)
        dtype = next(iter(updates.values())).frozen["norm"].dtype
        norm = (1 / jnp.sqrt(jnp.maximum(counts, 1))).astype(dtype)
        return {path: {"norm": norm} for path in updates}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        entries = update["theta"] * update["norm"]
        a, b = (entries[indices] for indices in self._indices(update))
        return add_network(w, update, [(a, "*stack *in rank"), (b, "*stack rank *out")], update.scale)

    def with_indices(self, update: Update) -> Update:
        """The update with its indices as arrays, and without a seed."""
        if self.seed is None:
            return update
        declared = dataclasses.replace(self, seed=None).shapes(update.axes)
        digits = {
            f"{name}_index": to_digits(np.asarray(indices), count_digits(self.length))
            for name, indices in zip("ab", self._indices(update), strict=True)
        }
        frozen = {name: array.reshape(declared[name]) for name, array in digits.items()}
        method = dataclasses.replace(self, seed=None)
        return dataclasses.replace(update, method=method, frozen={"norm": update.frozen["norm"], **frozen})

    @random_matrices.drawn_alike
    def _indices(self, update: Update) -> tuple[jax.Array, jax.Array]:
        """The places in theta of the entries of A `(*stack, in, rank)` and of B `(*stack, rank, out)`."""
        if self.seed is None:
            a, b = (from_digits(lax.stop_gradient(update.joined(name))) for name in ("a_index", "b_index"))
            return a, b
        key = random_matrices.keys(self.seed, 1)[0]
        for digit in lax.stop_gradient(update.frozen["site"]).astype(jnp.uint32):
            key = jax.random.fold_in(key, digit)
        axes = update.axes
        stack, n_in, n_out = axes.sizes("*stack"), axes.count("*in"), axes.count("*out")
        shapes = (*stack, n_in, self.rank), (*stack, self.rank, n_out)
        a, b = (random_matrices.integers(k, s, self.length) for k, s in zip(jax.random.split(key), shapes, strict=True))
        return a, b
