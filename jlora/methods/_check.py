"""Hyper-parameters: what they have to be."""

import math


def whole(method: object, **numbers: object) -> None:
    """Raises unless every number is a whole one from 1 on."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(method).__name__}'s {name} is a whole number from 1 on, not {value!r}.")


def share(method: object, **numbers: object) -> None:
    """Raises unless every number is in [0, 1)."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{type(method).__name__}'s {name} is a share in [0, 1), not {value!r}.")


def choice(method: object, *allowed: object, **values: object) -> None:
    """Raises unless every value is among those allowed."""
    for name, value in values.items():
        if value not in allowed:
            said = ", ".join(map(repr, allowed))
            raise ValueError(f"{type(method).__name__}'s {name} is one of {said}, not {value!r}.")


def scale(alpha: float | None, rank: int, rank_stabilized: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank); 1 without alpha."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
