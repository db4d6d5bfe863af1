"""Banks on disk: a folder with one checkpoint for each member, and an index that is replaced last."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from jlora._tree.paths import closest_matches
from jlora.bank.bank import Bank, stack
from jlora.io.checkpoint import bank_index, orbax
from jlora.io.checkpoint.errors import CheckpointError
from jlora.io.file_paths import absolute
from jlora.methods._base import Adapter


def save(path: str | os.PathLike[str], bank: Bank, *, params: Any = None) -> None:
    """Writes a bank to a folder, completely or not at all: one checkpoint for each member, and an index.

    A bank that is in the folder already is replaced, once the new one is complete. If the process is killed before, the
    folder still holds the old bank.

    Arguments:
        path: the folder.
        bank: the bank.
        params: the base parameters, as for `jlora.save`.

    Raises:
        FileExistsError: if the path exists and is not a bank.
        CheckpointError: if the folder cannot be written; a bank that was there is then still complete.
    """
    folder = absolute(path)
    if folder.exists() and any(folder.iterdir()) and not _is_bank(folder):
        raise FileExistsError(f"{folder} exists and holds no bank. Save to another path, or remove it first.")
    written = folder / f"members-{uuid.uuid4().hex}"
    try:
        written.mkdir(parents=True)
        places: dict[str, str | None] = {}
        for k, name in enumerate(bank):
            member = bank[name]
            places[name] = f"{written.name}/{k}" if member else None  # a member may adapt no weight at all
            if member:
                orbax.save(written / str(k), member, params=params)
        index = {"format": bank_index.FORMAT, "members": places}
        _write_durably(folder / bank_index.FILE, json.dumps(index, indent=1))
    except (OSError, CheckpointError) as error:
        shutil.rmtree(written, ignore_errors=True)
        raise CheckpointError(f"The bank could not be written to {folder}: {error}") from error
    for other in folder.glob("members-*"):
        if other != written:
            shutil.rmtree(other, ignore_errors=True)


def load(path: str | os.PathLike[str], *, params: Any = None) -> Bank:
    """Reads a bank that `save` wrote.

    Arguments:
        path: the folder.
        params: the base parameters, as for `jlora.load`.

    Raises:
        FileNotFoundError: if the folder does not exist.
        CheckpointError: if it holds no bank, or a member is damaged or was saved for another base; names every such
            member. `load_member` reads the others.
    """
    folder, members = _open(path)
    adapters, errors = {}, {}
    for name, place in members.items():
        try:
            adapters[name] = orbax.load(folder / place, params=params) if place else {}
        except (CheckpointError, FileNotFoundError) as error:
            errors[name] = error
    if errors:
        reasons = "\n  ".join(f"{name}: {error}" for name, error in errors.items())
        raise CheckpointError(
            f"{len(errors)} of {len(members)} members of the bank at {folder} cannot be read; "
            f"jlora.bank.load_member(path, name) reads each of the others.\n  {reasons}"
        )
    return stack(adapters, params=params)


def load_member(path: str | os.PathLike[str], name: str, *, params: Any = None) -> Adapter:
    """Reads one member of a bank.

    Arguments:
        path: the folder of the bank.
        name: of the member.
        params: the base parameters, as for `jlora.load`.

    Raises:
        FileNotFoundError: if the folder does not exist.
        KeyError: if the bank has no such member, with the names that are close to it.
        CheckpointError: if the folder holds no bank, or the member is damaged or was saved for another base.
    """
    folder, members = _open(path)
    if name not in members:
        raise KeyError(f"The bank at {folder} has no adapter {name!r} ({closest_matches(name, members)}).")
    place = members[name]
    return orbax.load(folder / place, params=params) if place else {}


def names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the members of a bank on disk.

    Arguments:
        path: the folder of the bank.

    Raises:
        FileNotFoundError: if the folder does not exist.
        CheckpointError: if it holds no bank.
    """
    return list(_open(path)[1])


def _is_bank(folder: Path) -> bool:
    """Whether a folder holds a bank, or what is left of one whose first save was killed."""
    return (folder / bank_index.FILE).is_file() or all(entry.name.startswith("members-") for entry in folder.iterdir())


def _open(path: str | os.PathLike[str]) -> tuple[Path, dict[str, str | None]]:
    folder = absolute(path)
    return folder, bank_index.read(folder)


def _write_durably(file: Path, text: str) -> None:
    """Replaces a file in one step, after its contents are on disk."""
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
