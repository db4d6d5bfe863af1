"""Super-Tuning: the entries of the weight with the largest magnitudes are trained."""

import dataclasses
from collections.abc import Mapping
from typing import final

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.digits import traced_digits
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, nonzero, positive_integer, scale_of, switch
from jlora.methods._common.matrices import as_matrix, in_out, rank_too_high, too_large_to_number
from jlora.methods._common.networks import add_network, add_structure
from jlora.methods._common.sparse_structures import Placed
from jlora.methods.lora import LoRA


@final
@dataclasses.dataclass(frozen=True)
class SuperTuning(Method):
    """Trains the entries of a weight that have the largest magnitudes, and a LoRA too if a rank is given.

        W + S + s A B,    S: zero except for the entries s: (*stack, entries),    s = alpha / rank

    The places of the entries are frozen, `(*stack, entries, digits)`: digits of `o * n_in + i` to the base 256. They
    come from the weight: `jlora.init(..., params=params)`. The entries and B start at zero.

    Arguments:
        sparsity: the share of the weight's entries that is not trained, in [0, 1).
        largest: whether the largest magnitudes are trained, or the smallest.
        rank: of the LoRA beside ("Supra"); None for none.
        alpha: of the LoRA; None makes its scale 1.
        merge_in_16_bits: as for `SHiRA`.

    Super-Tuning 2026, arXiv:2607.09287.
    """

    sparsity: float = fraction(0.99)
    largest: bool = switch(True)
    rank: int | None = positive_integer(None)
    alpha: float | None = nonzero(None)
    merge_in_16_bits: bool = switch(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and self.alpha is not None:
            raise ValueError(
                f"SuperTuning has alpha {self.alpha} and no LoRA that it scales: set a rank, or leave it out."
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("place",)

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        reason = site.unsupported_reason or ("" if self.rank is None else rank_too_high(site, self.rank))
        n_in, n_out = (0, 0) if reason else in_out(site)
        reason = reason or too_large_to_number(n_in, n_out)
        if reason or self.entries_of(n_in * n_out):
            return reason
        share = f"{1 - self.sparsity:.3g} of its {n_in} x {n_out} entries"
        return f"{share} is less than one entry; lower the sparsity"

    def entries_of(self, size: int) -> int:
        """How many entries of a weight of this size train."""
        return int(size * (1 - self.sparsity) + 1e-9)

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        sparse = {"s": "*stack entries", "place": "*stack entries digits"}
        return sparse if self.rank is None else {**sparse, **LoRA.factors}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"entries": self.entries_of(axes.count("*in") * axes.count("*out")), "digits": 4}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        magnitudes = jnp.abs(as_matrix(base, site.roles)).mT  # (*stack, out, in), the order of the places
        flat = magnitudes.reshape(*magnitudes.shape[:-2], -1)
        shapes = self.shapes(WeightAxes.of(site))
        places = lax.top_k(flat if self.largest else -flat, shapes["s"][-1])[1]
        arrays = {"s": jnp.zeros(shapes["s"], dtype), "place": traced_digits(places, 4).astype(dtype)}
        if self.rank is None:
            return arrays
        return arrays | LoRA(self.rank, self.alpha).init(key, site, dtype, None)

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        structure = Placed(n_in, n_out, self.entries_of(n_in * n_out))
        places, rounds = update["place"], self.merge_in_16_bits
        w = add_structure(w, update, update["s"], structure, update.scale, places, may_round=rounds)
        if self.rank is None:
            return w
        terms = [(update[name], update.declared[name]) for name in "ab"]
        return add_network(w, update, terms, scale_of(self.alpha, self.rank) * update.scale)
