"""The index of a bank's folder: the members by name, each with the folder of its checkpoint."""

import json
from pathlib import Path

from jlora.io.checkpoint.errors import CheckpointError

FILE = "bank.json"
FORMAT = 1


def read(folder: Path) -> dict[str, str | None]:
    """The folders of a bank's members by name, relative to that of the bank; None for a member that adapts nothing.

    Raises:
        FileNotFoundError: if the folder does not exist.
        CheckpointError: if it holds no bank, or one of a later format.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no saved bank at {folder}; jlora.bank.save(path, bank) writes one.")
    try:
        index = json.loads((folder / FILE).read_text(encoding="utf-8"))
        version, members = index["format"], index["members"]
        is_valid = isinstance(members, dict) and all(isinstance(place, str | None) for place in members.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} holds no complete bank: its index {FILE} is missing or damaged ({error}). Folders inside it "
            "are adapters that jlora.load reads."
        ) from error
    if version != FORMAT or not is_valid:
        raise CheckpointError(
            f"{folder / FILE} has the format {version!r}; this release reads {FORMAT}. Upgrade jlora, or save again."
        )
    return members
