"""A probe: what travels with a weight in the place of an update, to record the inputs of its products."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jlora._ir.weight import AdaptedWeight, TensorNetwork


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "key", "picks"],
    meta_fields=["terms", "scale", "key_term", "rate", "picked", "pick_terms", "latent", "in_parts", "path"],
)
@dataclasses.dataclass(frozen=True)
class Probe(TensorNetwork):
    """A network that adds nothing, and whose gradient is a statistic of the inputs.

    The first factor P has the weight's stack and in axes and, last, one axis more: x P takes the place of an input x.
    The second factor, ones along the stack, counts rows. All others are multipliers that the program applies.

    Arguments:
        path: the parameter. A weight that is a sum of parts of one parameter has a probe for each part.
    """

    path: str = ""

    @property
    def inputs(self) -> set[str]:
        """The indices of the in axes."""
        return set(self.terms[0][:-1]) - set(self.terms[1])

    @property
    def width(self) -> int:
        """The size of the axis that only the first factor has."""
        return self.factors[0].shape[-1]

    def refusal(self, contracted: Iterable[str]) -> str:
        """Why a product that sums these indices does not show the inputs of the weight; empty if it does."""
        shared = self.inputs & set(contracted)
        if not shared:  # another use, such as the output head of a tied embedding
            return ""
        if self.width == 1:
            return "it is looked up, and multiplied along the same axis"
        size = 1
        for name, n in zip(self.terms[0], self.factors[0].shape, strict=True):
            size *= n if name in shared else 1
        is_whole = shared == self.inputs and size >= self.width - 1
        return "" if is_whole else "a product contracts only a part of its in axes"


def by_path(networks: Iterable[TensorNetwork]) -> list[list[Probe]]:
    """The probes among some networks, those of one parameter together."""
    groups: dict[str, list[Probe]] = {}
    for n in networks:
        if isinstance(n, Probe):
            groups.setdefault(n.path, []).append(n)
    return list(groups.values())


def probes(values: Sequence[Any]) -> list[Probe]:
    """The probes of all weights among some values."""
    return [n for v in values if isinstance(v, AdaptedWeight) for n in v.networks if isinstance(n, Probe)]


def refuse(path: str, reason: str) -> None:
    """Raises because the inputs of a weight cannot be recorded.

    Raises:
        ValueError: with the path and the reason.
    """
    raise ValueError(
        f"The inputs of {path} cannot be recorded: {reason}. Leave the weight out of the adapter that jlora.calibrate "
        "gets."
    )
