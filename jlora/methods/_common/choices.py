"""Hyper-parameters: choices by name, and the scale that follows from alpha."""

import math


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
