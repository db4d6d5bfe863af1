"""Rows: trained rows of a weight, such as new tokens of an embedding."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice
from jlora.methods._common.initializers import zeros
from jlora.methods._common.matrices import in_out
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class Rows(Method):
    """Trains some rows of a weight: those of new tokens in an embedding (textual inversion, trained tokens).

        W[i_k, :] + d_k,    d: (*stack, rows, *out)
        W[:, i_k] + d_k,    d: (*stack, *in, rows),    with `axis="out"`

    d starts at zero. The rows of an embedding are its tokens, also if an output head is tied to it: then the head
    changes too. Of an output head of its own, a kernel (in, tokens), the tokens are along `axis="out"`. The update is a
    product with a matrix of zeros and ones, which is computed when it is needed: it costs what a LoRA costs whose rank
    is the number of rows.

    Arguments:
        indices: which rows, a tuple of different integers from 0. If a side has several axes, they count as joined.
        axis: the side that the indices count along, "in" or "out".

    Example:
        adapter = jlora.init(key, sites, {".*embedding": jlora.Rows((50257, 50258))})

    Gal et al. 2022, An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion,
    arXiv:2208.01618.
    """

    indices: tuple[int, ...] = (0,)
    axis: str = choice("in", "out")

    initializers = {"d": zeros}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "indices", _checked(self.indices))

    def unsupported_reason(self, site: Site) -> str:
        if site.unsupported_reason:
            return site.unsupported_reason
        size = in_out(site)[self.axis == "out"]
        if max(self.indices) < size:
            return ""
        return f"index {max(self.indices)} is above the last of its {size} {self.axis} rows, {size - 1}"

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return {"d": "*stack rows *out" if self.axis == "in" else "*stack *in rows"}

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"rows": len(self.indices)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        d = update["d"]
        places = jnp.arange(update.axes.count(f"*{self.axis}"))
        chosen = places[:, None] == jnp.asarray(self.indices)[None]
        if self.axis == "in":
            terms = [(chosen.astype(d.dtype), "*in rows"), (d, update.declared["d"])]
        else:
            terms = [(d, update.declared["d"]), (chosen.T.astype(d.dtype), "rows *out")]
        return add_network(w, update, terms, update.scale)


def _checked(indices: Any) -> tuple[int, ...]:
    listed = list(indices) if hasattr(indices, "__iter__") and not isinstance(indices, str) else []
    are_integers = all(isinstance(i, numbers.Integral) and not isinstance(i, bool) and int(i) >= 0 for i in listed)
    if not listed or not are_integers or len(set(listed)) < len(listed):
        raise ValueError(f"The indices of Rows are different integers from 0, at least one, not {indices!r}.")
    return tuple(map(int, listed))
