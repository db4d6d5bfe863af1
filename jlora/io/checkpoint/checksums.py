"""Checksums of the pieces of an array, so that every process verifies what it reads without the rest of the array."""

import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils

Region: TypeAlias = tuple[slice, ...]
"""A box in an array: one slice for each axis, with start and stop."""

PIECE_BYTES = 4 << 20  # of a piece, and of a chunk on the disk: a reader holds few of them beside the arrays
_ROW = 509  # words; a prime, so that blocks of a disk that change places change the checksum


def piece_shape(shard: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of a shard's pieces: contiguous in memory, and at most `PIECE_BYTES` if an element is.

    Arguments:
        shard: shape of the shard.
        itemsize: bytes of an element.
    """
    piece = list(shard)
    for axis in range(len(shard)):
        rows = PIECE_BYTES // max(1, itemsize * math.prod(shard[axis + 1 :]))
        piece[axis] = max(1, min(shard[axis], rows))
        if rows:
            break
    return tuple(piece)


@functools.lru_cache  # many arrays of an adapter have the same shape
def split(shape: tuple[int, ...], shard: tuple[int, ...], piece: tuple[int, ...]) -> list[Region]:
    """Returns the regions of all pieces of an array in row-major order. Pieces do not cross the borders of shards."""
    cuts = [
        [
            slice(start, min(start + p, first + s, n))
            for first in range(0, n, max(1, s))
            for start in range(first, min(first + s, n), max(1, p))
        ]
        for n, s, p in zip(shape, shard, piece, strict=True)
    ]
    return list(itertools.product(*cuts))


def contains(outer: Region, inner: Region) -> bool:
    """Whether all of `inner` is in `outer`."""
    return all(o.start <= i.start and i.stop <= o.stop for i, o in zip(inner, outer, strict=True))


def intersect(a: Region, b: Region) -> Region | None:
    """Returns the intersection of two regions, None if it is empty."""
    common = tuple(slice(max(i.start, j.start), min(i.stop, j.stop)) for i, j in zip(a, b, strict=True))
    return common if all(i.start < i.stop for i in common) else None


def relative_to(region: Region, origin: Region) -> tuple[Any, ...]:
    """Returns a region as an index into the array that holds `origin`; the result is a view, also of a scalar."""
    return (*(slice(r.start - o.start, r.stop - o.start) for r, o in zip(region, origin, strict=True)), ...)


def normalize_index(index: Region, shape: Sequence[int]) -> Region:
    """Returns an index as JAX gives it (`slice(None)` for a complete axis) with explicit starts and stops."""
    return tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))


def checksum(data: np.ndarray) -> int:
    """Returns a CRC-32 of an array's bytes, folded so that it runs at the speed of memory.

        crc32(rest, crc32(sum over rows of 509 words, modulo 2^64)),    rest = bytes that do not fill a row

    A change in a single word changes the sum of its column, and so the CRC.
    """
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    rows_end = raw.size - raw.size % (8 * _ROW)
    folded = raw[:rows_end].view(np.uint64).reshape(-1, _ROW).sum(axis=0, dtype=np.uint64)
    return zlib.crc32(raw[rows_end:].data, zlib.crc32(folded.astype("<u8").data))


def record(array: jax.Array | np.ndarray) -> dict[str, Any]:
    """Returns what a checkpoint records of an array: shape, dtype, its division, and a checksum for every piece.

    Every process reads its own shards only, one at a time. The processes then exchange the checksums.
    """
    shape = tuple(array.shape)
    shard = shape
    shards: list[tuple[Region, Any]] = [(tuple(slice(0, n) for n in shape), array)]
    if isinstance(array, jax.Array):
        shard = array.sharding.shard_shape(shape)
        shards = [(normalize_index(s.index, shape), s.data) for s in array.addressable_shards if s.replica_id == 0]
    piece = piece_shape(shard, array.dtype.itemsize)
    pieces = split(shape, shard, piece)
    sums = np.zeros(len(pieces), np.uint32)
    for region, data in shards:
        host = np.asarray(data)
        for k, part in enumerate(pieces):
            if contains(region, part):
                sums[k] = checksum(host[relative_to(part, region)])
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        sums = np.asarray(multihost_utils.process_allgather(sums)).sum(axis=0, dtype=np.uint32)
    return {
        "shape": list(shape),
        "dtype": array.dtype.name,
        "shard": list(shard),
        "piece": list(piece),
        "sums": sums.tolist(),
    }
