"""What is written for one module."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.weight_location import WeightLocation


class ModuleEntry(NamedTuple):
    """A module's factors, and the location of its weight, or of the first weight of several."""

    location: WeightLocation
    factors: ModuleFactors


def shared_field(entries: Mapping[str, ModuleEntry], field: str) -> Any:
    """The value of a method's field, which PEFT has once for all modules.

    Raises:
        ValueError: if the modules' methods differ in it.
    """
    values = {name: getattr(entry.factors.method, field) for name, entry in entries.items()}
    if len(set(values.values())) > 1:
        raise ValueError(
            f"PEFT has one {field} for all modules, and the adapter has {values}. Use one value, or save the modules "
            "as several adapters."
        )
    return next(iter(values.values()))
