"""`info`: which format a file has, and what it holds."""

import os
from collections.abc import Mapping
from pathlib import Path

from jlora._adapter.summary import Summary
from jlora.io.checkpoint import bank_index
from jlora.io.file_paths import absolute
from jlora.io.gguf import container
from jlora.io.info import checkpoints, gguf, kohya, loralib, peft
from jlora.io.info.report import Content, Info
from jlora.io.peft.config import PREFIX
from jlora.io.peft.folders import CONFIG, TENSORS
from jlora.io.peft.safetensors_file import load_metadata, load_tensors
from jlora.io.torch.pickled import load_state

_SINGLE_FILES = ("*.safetensors", "*.gguf")
_FORMATS = (
    "a checkpoint or a bank of jlora, a folder of PEFT, a state dict of loralib, a file of kohya, LyCORIS or diffusers "
    "and a LoRA in a GGUF file"
)


def info(path: str | os.PathLike[str]) -> Info:
    """Lists what an adapter file holds and what of it jlora would refuse, without a model.

        print(jlora.info("lora.safetensors"))        # in a shell: python -m jlora info lora.safetensors

    It reads every format that jlora reads: a checkpoint, a bank, a folder of PEFT, a state dict of loralib, a file of
    kohya, LyCORIS or diffusers, and a LoRA in a GGUF file.

    Arguments:
        path: a file, or the folder of a checkpoint, of a bank or of PEFT.

    Returns:
        the report: for every module or weight its method, rank, numbers, bytes and the norm of the change. What depends
        on the program (whether a module is there, whether a shape fits) is not checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the format is unknown, or the file is damaged.
        CheckpointError: if a checkpoint of jlora is damaged, or needs a later release.
    """
    place = absolute(path)
    if not place.exists():
        raise FileNotFoundError(f"There is no file or folder {place}.")
    return _of_folder(place) if place.is_dir() else _of_file(place)


def _of_folder(folder: Path) -> Info:
    if (folder / bank_index.FILE).is_file():
        summaries, refused = checkpoints.read_bank(folder)
        return Info(str(folder), "bank of jlora", summaries, refused)
    if (folder / CONFIG).is_file() or (folder / TENSORS).is_file():
        return _report(folder, "PEFT", peft.read(folder))
    if checkpoints.is_checkpoint(folder):
        return _report(folder, "checkpoint of jlora", checkpoints.read(folder))
    steps = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and checkpoints.is_checkpoint(entry))
    if steps:
        raise ValueError(f"{folder} holds several checkpoints, {', '.join(steps)}: name one of them.")
    files = [file for pattern in _SINGLE_FILES for file in sorted(folder.glob(pattern))]
    if len(files) == 1:
        return _of_file(files[0])
    raise _unknown(folder)


def _of_file(file: Path) -> Info:
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[:4] == b"PK\x03\x04":
        return _of_state(file)
    if start[:4] == container.MAGIC:
        return _report(file, "GGUF", gguf.read(*container.read(file)))
    if start[8:] == b"{":
        return _of_tensors(file, load_tensors(file, integers=True), load_metadata(file))
    raise _unknown(file)


def _of_state(file: Path) -> Info:
    """The report on a file of `torch.save`."""
    state = load_state(file)
    if not loralib.is_state(list(state)):
        raise _unknown(file, "It is a file of torch.save, of which jlora reads loralib's: save it as safetensors.")
    return _report(file, "loralib", loralib.read(state))


def _of_tensors(file: Path, tensors: peft.Tensors, metadata: Mapping[str, str]) -> Info:
    """The report on tensors by name, whose names tell the format."""
    if any(name.startswith(PREFIX) for name in tensors):
        if (file.parent / CONFIG).is_file():
            return _report(file, "PEFT", peft.read(file.parent))
        refused = [f"{CONFIG} is not beside the file: PEFT keeps the method, the rank and alpha in it."]
        return _report(file, "PEFT", peft.content(None, tensors, refused))
    names = list(tensors)
    if loralib.is_state(names):
        return _report(file, "loralib", loralib.read(tensors))
    if kohya.is_file(names):
        return _report(file, kohya.format_name(names), kohya.read(tensors, metadata))
    raise _unknown(file, f"Its tensors are {', '.join(list(tensors)[:3]) or 'none'}, ...: no adapter's.")


def _report(place: Path, name: str, content: Content) -> Info:
    return Info(str(place), name, {"": Summary(content.updates)}, content.refused, content.notes)


def _unknown(place: Path, reason: str = "") -> ValueError:
    return ValueError(f"{place} has an unknown format. {reason}{' ' if reason else ''}jlora reads {_FORMATS}.")
