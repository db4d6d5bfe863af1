"""Which of very many cases the default run takes: a part of them, another one every day, all in the nightly run."""

from __future__ import annotations

import datetime
import os
import zlib

# The workers of pytest-xdist inherit the variable, so that all collect the same tests, at midnight too.
VARIABLE = "JLORA_TESTS_SEED"
SEED = os.environ.setdefault(VARIABLE, datetime.datetime.now(datetime.UTC).date().isoformat())


def drawn(*names: str, one_in: int = 3) -> bool:
    """Whether the default run takes the case of these names; it depends on the names and the seed alone."""
    return zlib.crc32(" ".join((SEED, *names)).encode()) % one_in == 0


def drawn_cases(test: str, count: int, one_in: int) -> set[int]:
    """Which of a test's cases the default run takes: one in `one_in` of them, at least one, other ones on other days.

    Arguments:
        test: the name of the test.
        count: how many cases it has.
        one_in: the share.
    """
    step = min(one_in, count)
    return set(range(zlib.crc32(f"{SEED} {test}".encode()) % step, count, step))
