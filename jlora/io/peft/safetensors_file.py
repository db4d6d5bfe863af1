"""Tensors by name in one safetensors file, bfloat16 included."""

import os
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from jlora.io.torch.tensor_files import read_header

_DTYPES = ("F64", "F32", "F16", "BF16")
_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name."""
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with open(path, "wb") as file:
        file.write(safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


def load_tensors(path: str | os.PathLike[str], *, integers: bool = False) -> dict[str, np.ndarray]:
    """Reads tensors by name.

    Arguments:
        path: the file.
        integers: whether to accept integers too: other libraries store some scalars so.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds a dtype that no factor has.
    """
    header = read_header(path)
    for name, entry in header.items():
        if entry.code not in (*_DTYPES, *(_INTEGERS if integers else ())):
            raise ValueError(f"{name} in {path} has the dtype {entry.code}; factors have {', '.join(_DTYPES)}.")
    return {name: header[name].read() for name in sorted(header)}


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the metadata of a file that `load_tensors` reads."""
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata() or {}
