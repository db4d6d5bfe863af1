"""Unmodified layers and blocks of Flax Linen, Flax NNX and Equinox, one function a case."""

from tests.support.third_party import blocks, convolutions, layers, state
from tests.support.third_party.case import Case

STATEFUL = state.CASES
CASES = [*layers.CASES, *convolutions.CASES, *blocks.CASES, *STATEFUL]

__all__ = ["CASES", "STATEFUL", "Case"]
