"""Successive draws of random numbers from one generator of torch, and the seeds of the generators."""

from __future__ import annotations

from typing import Any

SEEDS = (0, 5, 2**40 + 5, -3)
CALLS: list[tuple[Any, ...]] = [
    ("uniform", (3,), -0.3, 0.7),
    ("uniform", (16, 17), 0.0, 1.0),
    ("kaiming_uniform", (5, 64)),
    ("kaiming_uniform", (33, 3, 2)),
    ("normal", (3,), 0.0, 1.0),  # an odd number: the second of a pair is kept
    ("uniform", (2, 2), 0.0, 1.0),
    ("normal", (5, 2), 0.5, 2.0),
    ("normal", (16,), 0.0, 1.0),
    ("normal", (17,), 0.0, 0.1),  # the last block overlaps the first
    ("normal", (4, 5, 7), -1.0, 1 / 3),
    ("normal", (1,), 0.0, 1.0),
    ("integers", 0, 7, (20,)),
    ("integers", -3, 2**28 - 4, (5,)),  # the widest range of one word
    ("integers", -3, 2**28 - 3, (5,)),
    ("integers", 0, 2**33 + 1, (5,)),
    ("permutation", 1, 1),
    ("permutation", 10, 10),
    ("permutation", 1000, 999),
    ("permutation", 100000, 50),
]
