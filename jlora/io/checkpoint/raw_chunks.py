"""Arrays whose bytes lie in a checkpoint's files as they are: read straight into the memory that they go to."""

import dataclasses
import functools
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.io.checkpoint.checksums import Box
from jlora.io.checkpoint.ocdbt_index import Span


@dataclasses.dataclass(frozen=True)
class Raw:
    """An array in chunks of one shape, none of them compressed.

    Arguments:
        chunks: by their starts, the bytes or where those lie.
        shape: of a chunk.
        itemsize: bytes of a number.
    """

    chunks: Mapping[tuple[int, ...], bytes | Span]
    shape: tuple[int, ...]
    itemsize: int

    @property
    def start(self) -> tuple[str, int]:
        """Where the first chunk lies, to sort by."""
        first = next(iter(self.chunks.values()))
        return (str(first.file), first.start) if isinstance(first, Span) else ("", 0)

    def read(self, files: "Files", box: Box, sink: Callable[[Callable[[np.ndarray], None]], Any]) -> Any:
        """What `sink` makes of a function that fills arrays of bytes with those of a piece, one after the other.

        Raises:
            ValueError: where the file ends early.
            OSError: where it cannot be read.
        """
        corner = tuple(b.start // n * n for b, n in zip(box, self.shape, strict=True))
        offset = 0
        for b, at, n in zip(box, corner, self.shape, strict=True):
            offset = offset * n + b.start - at
        where = self.chunks[corner]
        start = offset * self.itemsize
        if isinstance(where, Span):
            file = files.open(where.file)
            file.seek(where.start + start)
        else:
            file = io.BytesIO(where[start:])
        return sink(lambda block: _fill(block, file))


class Files:
    """The file that a thread read from last, open."""

    def __init__(self) -> None:
        self.path, self.file = None, None

    def open(self, path: Path) -> io.FileIO:
        """A file, at whatever place it was left."""
        if self.file is None or path is not self.path:
            self.close()
            self.path, self.file = path, path.open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads farther ahead
        return self.file

    def close(self) -> None:
        """Closes it."""
        if self.file is not None:
            self.file.close()
        self.file = None


def _fill(block: np.ndarray, file: Any) -> None:
    left = block.data
    while len(left):
        count = file.readinto(left)
        if not count:
            raise ValueError("a file ends early")
        left = left[count:]


def find(index: Mapping[str, bytes | Span], name: str, record: Any) -> Raw | None:
    """An array as its bytes are stored; None where they are compressed, or not what was recorded, or not all there."""
    said = index.get(f"{name}/.zarray")
    shape, shard, piece = (tuple(record[field]) for field in ("shape", "shard", "piece"))
    names = _chunks(said, record["dtype"], shape, shard, piece) if isinstance(said, bytes) else None
    if names is None:
        return None
    itemsize = jnp.dtype(record["dtype"]).itemsize
    chunks = {start: index.get(f"{name}/{chunk}", b"") for start, chunk in names}
    found = {value.size if isinstance(value, Span) else len(value) for value in chunks.values()}
    return Raw(chunks, shard, itemsize) if found == {math.prod(shard) * itemsize} else None


@functools.lru_cache
def _chunks(
    said: bytes, dtype: str, shape: tuple[int, ...], shard: tuple[int, ...], piece: tuple[int, ...]
) -> Sequence[tuple[tuple[int, ...], str]] | None:
    """Starts and names of chunks, which are the same for all arrays of one shape; None where they are not plain bytes.

    Arguments:
        said: zarr's description.
        dtype: as recorded, like the rest.
    """
    meta = json.loads(said)
    plain = {"compressor": None, "filters": None, "order": "C", "shape": list(shape), "chunks": list(shard)}
    if any(meta.get(field) != value for field, value in plain.items()) or not _same(meta.get("dtype"), dtype):
        return None
    if any(s % c for s, c in zip(shape, shard, strict=True)) or not _contiguous(piece, shard):
        return None
    separator = meta.get("dimension_separator", ".")
    return [
        (tuple(k * c for k, c in zip(at, shard, strict=True)), separator.join(map(str, at)) or "0")
        for at in itertools.product(*(range(s // c) for s, c in zip(shape, shard, strict=True)))
    ]


def _same(spelled: Any, dtype: str) -> bool:
    """Whether zarr's name of a dtype, with its order of bytes, is that of the record."""
    return isinstance(spelled, str) and jnp.dtype(spelled) == jnp.dtype(dtype)


def _contiguous(piece: Sequence[int], shard: Sequence[int]) -> bool:
    """Whether all pieces of a shard are runs of its bytes."""
    first = next((axis for axis, n in enumerate(piece) if n > 1), len(piece))
    return all(p == n for p, n in zip(piece[first + 1 :], shard[first + 1 :], strict=True))
