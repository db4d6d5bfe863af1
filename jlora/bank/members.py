"""The adapters that are combined: with names, weights, and a check that they fit one base."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jlora._tree.paths import path_number
from jlora.bank.bank import Bank, unstack
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single, with_static_scale
from jlora.methods._sharing import untie


@dataclasses.dataclass(frozen=True)
class Member:
    """An adapter that is combined with others.

    Arguments:
        name: its name, or its number in a list.
        number: an integer that no other member has, to be folded into PRNG keys.
        weight: by which its change is multiplied.
        adapter: the adapter.
    """

    name: str
    number: int
    weight: float
    adapter: Adapter


def weighted_members(adapters: Any, weights: Any) -> list[Member]:
    """The adapters with their names and weights.

    Arguments:
        adapters: a list of adapters, a dict by name, or a bank.
        weights: a list of numbers, or a dict by the same names; None for 1 each.

    Raises:
        TypeError: if `adapters` is neither, or holds something else than adapters.
        ValueError: if there are no adapters, or not one finite weight for each.
    """
    listed = _listed(adapters)
    if not listed:
        raise ValueError("There are no adapters to combine.")
    weights = _weights([name for name, _, _ in listed], weights)
    return [
        Member(name, number, weight, _with_static_scales(adapter))
        for (name, number, adapter), weight in zip(listed, weights, strict=True)
    ]


def _listed(adapters: Any) -> list[tuple[str, int, Any]]:
    """The name, the number and the adapter of each member."""
    adapters = unstack(adapters) if isinstance(adapters, Bank) else adapters
    if isinstance(adapters, Sequence) and not isinstance(adapters, str):
        return [(str(number), number, adapter) for number, adapter in enumerate(adapters)]
    if isinstance(adapters, Mapping) and not any(isinstance(value, Update) for value in adapters.values()):
        return [(str(name), path_number(str(name)), adapter) for name, adapter in adapters.items()]
    given = "one adapter: pass [adapter]" if isinstance(adapters, Mapping) else type(adapters).__name__
    raise TypeError(f"Expected a list of adapters, a dict of adapters by name or a bank, found {given}.")


def _with_static_scales(adapter: Any) -> Adapter:
    return {path: with_static_scale(path, update) for path, update in untie(as_single(adapter)).items()}


def _weights(names: Sequence[str], weights: Any) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"The weights are for {sorted(weights)}, the adapters are {sorted(names)}: name the same.")
        weights = [weights[name] for name in names]
    numbers = [float(weight) for weight in weights]
    if len(numbers) != len(names):
        raise ValueError(f"There are {len(numbers)} weights for {len(names)} adapters: pass one for each.")
    for name, weight in zip(names, numbers, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {name} is {weight}: pass a finite number.")
    return numbers


def check_same_weight(path: str, members: Sequence[Member]) -> None:
    """Checks that all members update a weight of one shape, with the same roles of its axes.

    Raises:
        ValueError: with the path, the adapters, and what each has.
    """
    first, *others = members
    for field in ("shape", "roles"):
        expected = getattr(first.adapter[path], field)
        for other in others:
            value = getattr(other.adapter[path], field)
            if value != expected:
                raise ValueError(
                    f"{path} has the {field} {expected} in adapter {first.name} and {value} in adapter {other.name}. "
                    "Only adapters of one base and one program can be combined."
                )
