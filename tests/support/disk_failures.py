"""Saves that cannot succeed, in a process of their own: a program for `tests/io/test_durability.py`.

    python -m tests.support.disk_failures FOLDER

Prints a line of JSON for each: what was raised, and what is in the folder afterwards.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora
from tests.support import toy_model


def attempt(folder: Path, name: str, adapter: dict) -> None:
    try:
        jlora.save(folder / name, adapter)
        raised = ""
    except jlora.CheckpointError as error:
        raised = str(error)
    print(json.dumps({"raised": raised, "there": sorted(found.name for found in folder.iterdir())}), flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    adapter = toy_model.adapter()
    large = jax.tree.map(lambda a: jnp.ones((300, 300), a.dtype), adapter)
    attempt(folder, "before", adapter)

    # A disk that is full: no file may grow beyond 100 KB.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    attempt(folder, "full", large)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    # A folder in which nothing may be written; root may write anywhere, so it becomes nobody.
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    attempt(folder, "read-only", adapter)
    if root:
        os.seteuid(0)
    folder.chmod(0o755)

    attempt(folder, "full", adapter)  # once there is space again


if __name__ == "__main__":
    main()
