"""The arrays that the scripts in `golden/` recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Sections = dict[str, dict[str, dict[str, np.ndarray]]]


def sections(path: Path) -> Sections:
    """The arrays of a file by section, name and key."""
    out: Sections = {}
    with np.load(path) as file:
        for full in file:
            section, name, key = full.split("/", 2)
            out.setdefault(section, {}).setdefault(name, {})[key] = file[full]
    return out
