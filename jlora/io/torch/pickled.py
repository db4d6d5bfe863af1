"""Tensors in files of `torch.save`, read without torch, and without running what a file asks for.

Such a file is a zip archive with one entry of raw bytes for each storage and a pickle that describes the tensors. Only
the few names that torch writes for a dict of tensors are accepted from the pickle.
"""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}


class _StorageType(NamedTuple):
    dtype: np.dtype


def load_state(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors by name of a file that `torch.save(state_dict, path)` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds anything but a dict of floating-point tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            state = _Reader(archive).load()
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of torch.save: {error}") from error
    wrong = [name for name, value in state.items() if not isinstance(value, np.ndarray) or not isinstance(name, str)]
    if wrong:
        raise ValueError(f"{path} holds {wrong[:5]}, which are no tensors. Save a dict of tensors by name.")
    return state


class _Reader(pickle._Unpickler):  # that in C allocates whatever size a damaged file names
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._archive = archive
        names = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it has no entry data.pkl")
        self._folder = names[0].removesuffix("data.pkl")
        order = self._folder + "byteorder"
        if order in self._entries and self._bytes(order) != b"little":
            raise ValueError("its bytes are in big-endian order")
        super().__init__(io.BytesIO(self._bytes(names[0])))

    def load(self) -> dict[Any, Any]:
        state = super().load()
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, and no dict")
        return state

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in _DTYPES:
            return _StorageType(jnp.dtype(_DTYPES[name]))
        raise ValueError(f"it needs {module}.{name}, and a dict of floating-point tensors does not")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage_type, key, *_ = pid
        return np.frombuffer(self._bytes(f"{self._folder}data/{key}"), storage_type.dtype)

    def _bytes(self, name: str) -> bytes:
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed, which torch does not do")
        return self._archive.read(entry)


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A copy of a part of a storage."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if min(offset, *size, *stride, last) < 0 or last >= storage.size:
        raise ValueError(f"a tensor of shape {tuple(size)} exceeds its storage of {storage.size} numbers")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
