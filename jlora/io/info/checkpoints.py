"""What jlora's own checkpoints and banks hold."""

from pathlib import Path

from jlora._adapter.summary import Summary, summary
from jlora.io.checkpoint import bank_index, metadata, orbax
from jlora.io.checkpoint.errors import CheckpointError
from jlora.io.info.report import Content


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a saved adapter."""
    return (folder / orbax.METADATA).is_dir() or (folder / orbax.ARRAYS).is_dir()


def read(folder: Path) -> Content:
    """The content of a checkpoint, checksums verified.

    Raises:
        CheckpointError: if it is damaged, or has a format or a method that this release does not know.
    """
    meta = metadata.read(folder / orbax.METADATA)
    notes = []
    if meta["base"] is None:
        notes.append("No base is recorded: jlora.load accepts any parameters that the adapter fits.")
    if meta["state"] is not None:
        notes.append("A state of training is beside the adapter: jlora.load_state reads it.")
    return Content(summary(orbax.load(folder)).updates, notes=tuple(notes))


def read_bank(folder: Path) -> tuple[dict[str, Summary], tuple[str, ...]]:
    """The summary of every member of a bank, and a sentence for each that is refused.

    Raises:
        CheckpointError: if the index is damaged.
    """
    summaries, refused = {}, []
    for name, place in bank_index.read(folder).items():
        try:
            summaries[name] = summary(orbax.load(folder / place) if place else {})
        except (CheckpointError, FileNotFoundError) as error:
            refused.append(f"{name}: {error}")
    return summaries, tuple(refused)
