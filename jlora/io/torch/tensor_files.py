"""The tensors of a model's checkpoint, read one at a time: safetensors files, folders with shards, or arrays."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jlora.io.file_paths import absolute

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Arguments:
        file: the file that holds it.
        code: its dtype as the file spells it, such as "BF16".
        shape: its shape.
        start: the byte of the file at which it starts.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype.

        Raises:
            ValueError: if NumPy has no such dtype.
        """
        if self.code not in DTYPES:
            raise ValueError(f"A tensor in {self.file} has the dtype {self.code}; jlora reads {', '.join(DTYPES)}.")
        return jnp.dtype(DTYPES[self.code])

    def read(self) -> np.ndarray:
        """The tensor; nothing else of the file is read."""
        values = np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.start)
        return values.reshape(self.shape)


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            header = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices}
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        offsets = json.loads(file.read(length))
    starts = {name: 8 + length + offsets[name]["data_offsets"][0] for name in header}
    return {name: TensorEntry(Path(path), code, shape, starts[name]) for name, (code, shape) in header.items()}


class TensorFiles:
    """The tensors of a checkpoint by name.

    Arguments:
        entries: what is known of each tensor before it is read.
    """

    def __init__(self, entries: Mapping[str, TensorEntry | np.ndarray]) -> None:
        self.entries = dict(entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.entries[name].shape)

    def size(self, name: str) -> int:
        """The number of a tensor's elements."""
        return math.prod(self.shape(name))

    def floating(self) -> list[str]:
        """The names of the tensors that hold floating-point numbers of 16 bits or more."""
        return [name for name, entry in self.entries.items() if _dtype_name(entry) in _FLOATS]

    def read(self, name: str) -> np.ndarray:
        """One tensor, which is not kept."""
        entry = self.entries[name]
        return entry.read() if isinstance(entry, TensorEntry) else np.asarray(entry)


def _dtype_name(entry: TensorEntry | np.ndarray) -> str:
    return DTYPES.get(entry.code, entry.code) if isinstance(entry, TensorEntry) else str(entry.dtype)


def open_tensors(source: str | os.PathLike[str] | Mapping[str, Any]) -> TensorFiles:
    """The tensors of a checkpoint, of which only the headers are read here.

    Arguments:
        source: a safetensors file; a folder with one such file, or with shards and their index; or arrays by name.

    Raises:
        FileNotFoundError: if a file is missing; the message states what a folder must hold.
        ValueError: if a file is damaged, or the index does not fit its shards.
    """
    if isinstance(source, Mapping):
        return TensorFiles(source)
    path = absolute(source)
    if not path.is_dir():
        return TensorFiles(read_header(path))
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return TensorFiles(_read_shards(indices[0]))
    chosen = [file for file in files if file.name == "model.safetensors"] or files
    if len(chosen) != 1 or indices:
        raise FileNotFoundError(
            f"{path} must hold model.safetensors, or shards with one *.safetensors.index.json; it has "
            f"{[file.name for file in (*indices, *files)] or 'neither'}. Pass the file, or save the model with "
            "save_pretrained (other formats are not read)."
        )
    return TensorFiles(read_header(chosen[0]))


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    """The tensors that an index of shards lists."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {file: read_header(index.parent / file) for file in dict.fromkeys(weight_map.values())}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index} cannot be read as an index of shards: {error!r}") from error
    missing = [name for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise ValueError(f"{index} lists {missing[:3]}, and the shards that it names for them lack them.")
    return {name: shards[file][name] for name, file in weight_map.items()}
