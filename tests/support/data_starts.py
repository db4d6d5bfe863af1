"""The small model of `golden/starts.py`, and what its starts share: two linear layers, one of them square."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

RANK, ALPHA, RHO = 3, 4.0, 2.0
SIZES = {"up": (8, 7), "mix": (7, 7), "down": (7, 6)}  # (in, out): wide and narrow, and a square one
ROWS = 40


def draw(name: str) -> np.ndarray:
    """Normal numbers by name: a weight `(in, out)`, the inputs or the targets."""
    shape = {"x": (ROWS, 8), "y": (ROWS, 6)}.get(name) or SIZES[name]
    rng = np.random.default_rng(list(name.encode()))
    values = rng.normal(size=shape)
    if name == "x":  # directions of different variance, and a mean
        values = values * 0.8 ** np.arange(8) + 0.3
    if name == "mix":  # so that the inputs of the last layer have few directions, and rank goes there
        values = values * 0.6 ** np.arange(7)
    return values.astype(np.float32)


def products_with(gradients: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The gradient of an adapter of LoRA without alpha, by NumPy from that of each matrix `(*stack, in, out)`."""

    def of(path: str, update: Any) -> Any:
        g = np.asarray(gradients[path], np.float64)
        a, b = (np.asarray(update.joined(name)) for name in "ab")
        factors = {"a": g @ b.swapaxes(-1, -2), "b": a.swapaxes(-1, -2) @ g}
        shaped = {name: array.reshape(update.factors[name].shape) for name, array in factors.items()}
        return dataclasses.replace(update, factors=shaped)

    return lambda adapter: {path: of(path, update) for path, update in adapter.items()}
