"""The files in a folder of PEFT."""

from pathlib import Path

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"


def file_in(folder: Path, name: str) -> Path:
    """A file in a folder of PEFT.

    Arguments:
        folder: the folder.
        name: of the file.

    Raises:
        FileNotFoundError: if it is missing; the message states what the folder has instead, and what to do.
    """
    path = folder / name
    if path.is_file():
        return path
    shards = sorted(folder.glob("adapter_model*-of-*"))
    others = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if name == TENSORS and (folder / _PICKLE).is_file():
        what = (
            f" It has {_PICKLE}, a pickle, which may run any code when it is read, and which jlora does not read: load "
            "it with PEFT and save it again, which writes safetensors."
        )
    elif name == TENSORS and shards:
        what = f" It has shards, {shards[0].name} and others, and PEFT has one file: join them, or save it with PEFT."
    elif others:
        what = f" It has adapters of other names in the folders {', '.join(others)}: pass one of these."
    else:
        what = " Pass the folder that PEFT's save_pretrained, or jlora.peft.save, has written."
    raise FileNotFoundError(f"{folder} has no {name}.{what}")
