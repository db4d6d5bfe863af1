"""Writes merged parameters as the safetensors files that a checkpoint has, one tensor in memory at a time."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jlora._tree.paths import Tree
from jlora.io.file_paths import absolute
from jlora.io.hf.tensor_values import TensorValues
from jlora.io.torch.module_names import Names
from jlora.io.torch.tensor_files import TensorEntry, TensorFiles, open_tensors

# Weights in other formats: they would be those of the base.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf")
_WEIGHT_INDICES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json")


def save_merged(
    folder: str | os.PathLike[str], params: Tree, names: Names, *, like: str | os.PathLike[str]
) -> tuple[str, ...]:
    """Writes a merged model as Hugging Face safetensors, in the files, names, dtypes and layouts of a checkpoint.

        names = jlora.peft.infer_names(params, "Qwen3-0.6B")       # before training: from the values
        merged = jlora.merge(params, adapter)
        jlora.hf.save_merged("merged", merged, names, like="Qwen3-0.6B")
        model = transformers.AutoModelForCausalLM.from_pretrained("merged")

    The headers of the files, the index of the shards, and all files that hold no weights (configuration, tokenizer) are
    copied. A tensor that no parameter holds (a pooler that the program lacks) keeps its value. Numbers that did not
    change keep theirs exactly, even if the parameters have fewer bits than the tensors. One tensor and the parameters
    that it is made of are in memory at a time, beside what `params` takes. Padding of a parameter that the checkpoint
    lacks, such as rows of a larger vocabulary, is left out.

    Arguments:
        folder: is created; it must not exist, or be empty. A save that fails leaves nothing there.
        params: the merged parameters, floating-point.
        names: what `jlora.peft.infer_names` returned for the parameters of the base; or a map that was written by hand,
            in which every parameter has an entry. Of a map by hand, transpositions are found by comparison with `like`.
        like: the checkpoint that the base was loaded from: a folder, or one safetensors file.

    Returns:
        the names of the floating-point tensors that no parameter holds.

    Raises:
        FileExistsError: if the folder holds something.
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if the folder is a part of `like`; if a parameter has no tensor or another shape, is quantised, or
            has numbers that the tensor's dtype cannot hold; if two parameters, or two layers of a stack, that share a
            tensor differ; or if a map by hand does not fit the checkpoint.
    """
    if isinstance(like, Mapping):
        raise TypeError("like must be the path of a checkpoint, a folder or a safetensors file, not arrays by name.")
    target, base = absolute(folder).resolve(), absolute(like)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists. Remove it, or choose another folder: save_merged never overwrites.")
    if base.resolve() in target.parents:
        raise ValueError(f"{target} is inside the checkpoint {base}: choose a folder outside of it.")
    files = open_tensors(base)
    values = TensorValues(params, names, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for shard, entries in _by_file(files).items():
            _write_shard(shard, entries, written / (shard.relative_to(base) if base.is_dir() else shard.name), values)
        if base.is_dir():
            _copy_others(base, written)
        written.chmod(0o755)
        written.replace(target)  # an empty folder is replaced
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise
    return values.unused


def _by_file(files: TensorFiles) -> dict[Path, dict[str, TensorEntry]]:
    """The tensors of every file in the order of their bytes."""
    shards: dict[Path, dict[str, TensorEntry]] = {}
    for name, entry in files.entries.items():
        assert isinstance(entry, TensorEntry)
        shards.setdefault(entry.file, {})[name] = entry
    return {
        file: dict(sorted(entries.items(), key=lambda item: item[1].start)) for file, entries in sorted(shards.items())
    }


def _write_shard(shard: Path, entries: Mapping[str, TensorEntry], target: Path, values: TensorValues) -> None:
    """Copies a file with new values of its tensors; what the index does not list is copied byte by byte."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with shard.open("rb") as source, target.open("wb") as file:
        for name, entry in entries.items():
            _copy_bytes(source, file, entry.start - file.tell())
            tensor = values.tensor(name)
            if tensor is not None:
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
                source.seek(file.tell())
        _copy_bytes(source, file, shard.stat().st_size - file.tell())
        file.flush()
        os.fsync(file.fileno())


def _copy_bytes(source: BinaryIO, file: BinaryIO, count: int) -> None:
    while count > 0:
        part = source.read(min(count, 1 << 24))
        if not part:
            raise ValueError(f"{source.name} ended too early: it changed while it was read.")
        file.write(part)
        count -= len(part)


def _copy_others(like: Path, target: Path) -> None:
    """Copies configuration, tokenizer and all other files that hold no weights."""
    for file in sorted(like.rglob("*")):
        relative = file.relative_to(like)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not is_hidden and not file.name.endswith((*_WEIGHTS, *_WEIGHT_INDICES)):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)
