"""An array as pieces with a sum each, so that every process can check what it reads without the rest."""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Box = tuple[slice, ...]

_BYTES = 4 << 20  # of a piece: small enough for a processor's cache
_ROW = 509  # words; a prime, so that blocks of a disk which change places change the sum
_BLOCK = 96 * 8 * _ROW  # bytes, which are in a processor's own cache when they are added up


def piece_shape(shard: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of a shard's pieces: contiguous, and of a few MiB."""
    piece = list(shard)
    for axis in range(len(shard)):
        rows = _BYTES // max(1, itemsize * math.prod(shard[axis + 1 :]))
        piece[axis] = max(1, min(shard[axis], rows))
        if rows:
            break
    return tuple(piece)


@functools.lru_cache
def grid(shape: tuple[int, ...], shard: tuple[int, ...], piece: tuple[int, ...] | None = None) -> list[Box]:
    """All pieces of an array in order; without `piece` its shards. Many arrays are of one shape."""
    cuts = [
        [
            slice(start, min(start + p, first + s, n))
            for first in range(0, n, max(1, s))
            for start in range(first, min(first + s, n), max(1, p))
        ]
        for n, s, p in zip(shape, shard, piece or shard, strict=True)
    ]
    return list(itertools.product(*cuts))


def inside(box: Box, other: Box) -> bool:
    """Whether `other` holds all of `box`."""
    return all(o.start <= b.start and b.stop <= o.stop for b, o in zip(box, other, strict=True))


def overlap(box: Box, other: Box) -> Box | None:
    """What two boxes share, None where it is nothing."""
    both = tuple(slice(max(b.start, o.start), min(b.stop, o.stop)) for b, o in zip(box, other, strict=True))
    return both if all(b.start < b.stop for b in both) else None


def within(box: Box, other: Box) -> tuple[Any, ...]:
    """A box as an index into the array that holds `other`; the result is a view, of a scalar too."""
    return (*(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, other, strict=True)), ...)


def plain(index: Box, shape: Sequence[int]) -> Box:
    """An index as JAX gives it, with its starts and stops."""
    return tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))


def checksum(data: np.ndarray, fill: Callable[[np.ndarray], None] | None = None) -> int:
    """The CRC-32 of an array's bytes, folded.

        crc32(rest, crc32(sum over rows of 509 words, modulo 2^64)),    the rest what fills no row

    Adding up runs at the speed of memory, and no change of a single word can leave its column's sum as it was.

    Arguments:
        data: the array.
        fill: writes the array's bytes, a block at a time and in order, each before it is added up: the processor's
            cache still has it then. The array has to be contiguous.
    """
    raw = (np.ascontiguousarray(data) if fill is None else data).reshape(-1).view(np.uint8)
    whole = raw.size - raw.size % (8 * _ROW)
    folded = np.zeros(_ROW, np.uint64)
    for start in range(0, raw.size, _BLOCK):
        block = raw[start : start + _BLOCK]
        if fill is not None:
            fill(block)
        rows = raw[start : min(start + _BLOCK, whole)].view(np.uint64).reshape(-1, _ROW)
        folded += rows.sum(axis=0, dtype=np.uint64)
    return zlib.crc32(raw[whole:].data, zlib.crc32(folded.astype("<u8").data))


def sums(array: Any) -> dict[str, Any]:
    """What is recorded of an array: shape, dtype, its division into shards and pieces, and a sum for every piece.

    Every process reads its own shards alone, one at a time; the sums are what they tell each other.
    """
    shape = tuple(array.shape)
    shard = shape
    held = [(tuple(slice(0, n) for n in shape), array)]
    if isinstance(array, jax.Array):
        shard = array.sharding.shard_shape(shape)
        held = [(plain(s.index, shape), s.data) for s in array.addressable_shards if s.replica_id == 0]
    piece = piece_shape(shard, array.dtype.itemsize)
    boxes = grid(shape, shard, piece)
    found = np.zeros(len(boxes), np.uint32)
    for index, data in held:
        host = np.asarray(data)
        for k, box in enumerate(boxes):
            if inside(box, index):
                found[k] = checksum(host[within(box, index)])
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        found = np.asarray(multihost_utils.process_allgather(found)).sum(axis=0, dtype=np.uint32)
    return {
        "shape": list(shape),
        "dtype": array.dtype.name,
        "shard": list(shard),
        "piece": list(piece),
        "sums": found.tolist(),
    }
