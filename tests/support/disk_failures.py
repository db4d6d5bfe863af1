"""Saves that cannot succeed, as a program of their own for `tests/io/test_durability.py`.

    python -m tests.support.disk_failures FOLDER

Prints a line of JSON for each save: the error, and the contents of the folder afterwards.
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
    print(json.dumps({"raised": raised, "there": sorted(path.name for path in folder.iterdir())}), flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    adapter = toy_model.adapter()
    large = jax.tree.map(lambda a: jnp.ones((300, 300), a.dtype), adapter)
    attempt(folder, "before", adapter)

    # As on a full disk: no file may be larger than 100 KB.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    attempt(folder, "full", large)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    # A folder without permission to write. Root may write anywhere, so it becomes the user "nobody".
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    attempt(folder, "read-only", adapter)
    if root:
        os.seteuid(0)
    folder.chmod(0o755)

    attempt(folder, "full", adapter)  # after space was freed


if __name__ == "__main__":
    main()
