"""Paths of files and folders as users write them."""

import os
from pathlib import Path


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path from the root, with the home folder in the place of a `~` at its start."""
    return Path(os.path.abspath(os.path.expanduser(path)))
