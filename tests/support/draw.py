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
