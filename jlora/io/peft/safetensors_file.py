"""Tensors by name in a safetensors file, bfloat16 included."""

import math
import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name."""
    contiguous = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with open(path, "wb") as file:
        file.write(safetensors.numpy.save(contiguous, metadata={"format": "pt"}))


def load_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads tensors by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds a dtype that no factor has.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            header = [(name, tensor.get_dtype(), tensor.get_shape()) for name, tensor in slices]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    data = np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")  # the size of the header, and the header
    tensors = {}
    for name, code, shape in header:  # one after the other without a gap, as the library has checked
        if code not in _DTYPES:
            raise ValueError(f"{name} in {path} has the dtype {code}; factors have {', '.join(_DTYPES)}.")
        dtype = jnp.dtype(_DTYPES[code])
        stop = start + math.prod(shape) * dtype.itemsize
        tensors[name] = data[start:stop].view(dtype).reshape(shape)
        start = stop
    return dict(sorted(tensors.items()))
