"""The catalogue of what a random program does to a weight before it uses it, and what the steps share."""

from __future__ import annotations

import random
from typing import Any

from tests.support.campaign.plan import Build, Scope, Weight, require

LARGEST = 600  # entries of a weight

STEPS: dict[str, Build] = {}


def step(build: Build) -> Build:
    """Adds a step to the catalogue."""
    STEPS[build.__name__] = build
    return build


def simple(name: str, fn: Any) -> None:
    """Adds a step that draws nothing."""
    STEPS[name] = lambda r, w, s: lambda a, p, x: fn(a)


def an_axis(r: random.Random, w: Weight, least: int = 1) -> int:
    axes = [k for k, n in enumerate(w.shape) if n >= least]
    require(bool(axes))
    return r.choice(axes)


def a_partner(r: random.Random, w: Weight, s: Scope) -> str | None:
    """Another parameter of the same shape, an adapted one if there is any; None for the weight itself."""
    same = [name for name, other in s.params.items() if (other.shape, other.dtype) == (w.shape, w.dtype)]
    options = [None, s.param(w.shape, w.dtype)] if w.dtype.itemsize > 1 else [None]
    return r.choice([*options, *same])
