"""The container GGUF: fields and tensors by name. Every size in a file is compared with what is left of it."""

import math
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.quantized.gguf import BLOCK, BYTES, GGUF

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_AXES = 4

# The types of fields: the numbers that a file has for them, as formats of `struct`.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# The types of tensors that are read; of those with blocks the names that `jlora.quantized.GGUF` has.
_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16", 28: "float64"}
_QUANTIZED = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0"}

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]


class _TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class _Cursor:
    """Reads a file's bytes in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"it ends within {count} bytes that begin at {self.position}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a field has the type {kind}, which GGUF does not have")
        item, count = self.number("I"), self.number("Q")
        if item == _ARRAY or count > len(self.data) - self.position:
            raise ValueError(f"an array has {count} items of the type {item}")
        return [self.value(item) for _ in range(count)]


def read(path: str | os.PathLike[str]) -> tuple[Fields, Tensors]:
    """The fields and the tensors of a file, tensors of 4 and 8 bits dequantised.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or has a version or a type of tensor that jlora does not read.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return _read(_Cursor(data))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error


def _read(cursor: _Cursor) -> tuple[Fields, Tensors]:
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"it has the version {version}, and jlora reads {_VERSIONS} in little-endian order")
    num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
    fields: Fields = {}
    for _ in range(num_fields):
        key = cursor.string()
        fields[key] = cursor.value(cursor.number("I"))
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {info.name: _tensor(cursor.data, start, info) for info in infos}
    if len(tensors) < len(infos):
        raise ValueError("two tensors have one name")
    return fields, tensors


def _tensor_info(cursor: _Cursor) -> _TensorInfo:
    name, num_axes = cursor.string(), cursor.number("I")
    if num_axes > _MAX_AXES:
        raise ValueError(f"{name} has {num_axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(num_axes))[::-1]  # the last axis comes first in a file
    return _TensorInfo(name, shape, cursor.number("I"), cursor.number("Q"))


def _tensor(data: bytes, start: int, info: _TensorInfo) -> np.ndarray:
    name, shape, kind, offset = info
    if kind in _QUANTIZED and shape and shape[-1] % BLOCK == 0:
        stored = (*shape[:-1], shape[-1] // BLOCK * BYTES[_QUANTIZED[kind]])
        blocks = _bytes(data, start + offset, stored, np.dtype(np.uint8), name)
        return np.asarray(GGUF(jnp.asarray(blocks), _QUANTIZED[kind]).dequantize())
    if kind not in _DTYPES:
        types = ", ".join([*_DTYPES.values(), *_QUANTIZED.values()])
        raise ValueError(f"{name} {shape} has the type {kind}, and jlora reads {types}")
    return _bytes(data, start + offset, shape, jnp.dtype(_DTYPES[kind]), name)


def _bytes(data: bytes, start: int, shape: tuple[int, ...], dtype: np.dtype, name: str) -> np.ndarray:
    count = math.prod(shape)
    if start + count * dtype.itemsize > len(data):
        raise ValueError(f"{name} {shape} ends after the file")
    return np.frombuffer(data, dtype, count, start if count else 0).reshape(shape)


def pack(fields: Mapping[str, str | float], tensors: Mapping[str, np.ndarray]) -> bytes:
    """A file of the newest version.

    Arguments:
        fields: strings, and numbers that are stored as float32.
        tensors: of 16-bit or 32-bit floating-point numbers.
    """
    kinds = {np.dtype(jnp.dtype(name)): kind for kind, name in _DTYPES.items()}
    parts = [MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(fields))]
    for key, value in fields.items():
        is_text = isinstance(value, str)
        parts += [_string(key), struct.pack("<I", _STRING if is_text else _FLOAT32)]
        parts.append(_string(value) if isinstance(value, str) else struct.pack("<f", value))
    offset, blobs = 0, []
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        parts += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", kinds[tensor.dtype], offset))
        blobs.append(_padded(np.ascontiguousarray(tensor).tobytes()))
        offset += len(blobs[-1])
    return b"".join([_padded(b"".join(parts)), *blobs])


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)
