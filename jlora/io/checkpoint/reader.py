"""Reads arrays of a checkpoint through TensorStore, each to where it is placed, and verifies their checksums."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from jlora.io.checkpoint import storage as _storage
from jlora.io.checkpoint.buffers import BufferPool
from jlora.io.checkpoint.checksums import Region, checksum, contains, intersect, normalize_index, relative_to, split
from jlora.io.checkpoint.errors import CheckpointError
from jlora.io.checkpoint.placement import Placement

_THREADS = max(2, min(8, os.cpu_count() or 1))
_BYTES_AHEAD = 4 << 20  # of chunks that a thread requests beside the one that it awaits

Record: TypeAlias = Mapping[str, Any]
"""What `checksums.record` returns for an array."""


@dataclasses.dataclass(frozen=True)
class _Target:
    """A part of an array that this process needs, the memory for it, and the devices that it goes to."""

    region: Region
    buffer: np.ndarray
    devices: list[Any]


def read(
    folder: Path, records: Mapping[str, Record], placements: Mapping[str, Placement]
) -> dict[str, jax.Array | np.ndarray]:
    """Reads arrays to where they are placed. A process reads the shards of its own devices.

    Arguments:
        folder: what Orbax wrote.
        records: by name, what was recorded of the arrays.
        placements: by name, the placement of every array to read.

    Raises:
        CheckpointError: if an array is missing, has another shape or dtype, or was altered; names all that were.
    """
    stored = [name for name in placements if all(records[name]["shape"])]
    with _reading(folder, "The index of the arrays"):
        storage = _storage.detect(folder, stored) if stored else None
    arrays: dict[str, jax.Array | np.ndarray] = {}
    altered = []
    buffers = BufferPool()
    with ThreadPoolExecutor(_THREADS) as pool:
        tasks = (pool.submit(_read_array, storage, name, records[name], at, buffers) for name, at in placements.items())
        for name, (targets, intact) in zip(placements, _results(tasks, _THREADS), strict=True):
            arrays[name] = _place(tuple(records[name]["shape"]), placements[name], targets)
            altered += [] if intact else [f"{name}: {records[name]['dtype']}{tuple(records[name]['shape'])}"]
    if altered:
        raise CheckpointError(
            f"Arrays in {folder} were altered after they were written: their checksums differ from those recorded. "
            f"{_storage.ADVICE}\n  " + "\n  ".join(sorted(altered))
        )
    return arrays


def _results(futures: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Yields the results of futures in order. At most `ahead` more are started, which limits the memory they hold."""
    waiting = collections.deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


@contextlib.contextmanager
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Raises all errors inside as errors of `what`: those of TensorStore have no class of their own."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CheckpointError(f"{what} in {folder} is missing or damaged: {reason}. {_storage.ADVICE}") from error


def _read_array(
    storage: _storage.Storage | None, name: str, record: Record, placement: Placement, buffers: BufferPool
) -> tuple[list[_Target], bool]:
    """Returns the parts of an array that are needed here, and whether their checksums are those recorded."""
    shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
    if storage is None or not all(shape):
        return _targets(shape, dtype, placement, buffers), True
    with _reading(storage.folder, f"The array {name!r}"):
        array = storage.open(name)
        if (array.shape, array.dtype.numpy_dtype) != (shape, dtype):
            raise ValueError(f"expected {dtype.name}{shape}, found {array.dtype.name}{tuple(array.shape)}")
        targets = _targets(shape, dtype, placement, buffers)
        for target in targets:
            _fill(array, target)
        reread = functools.cache(lambda: storage.open(name, cached=True))
        pieces = split(shape, tuple(record["shard"]), tuple(record["piece"]))
        for region, recorded in zip(pieces, record["sums"], strict=True):
            if any(intersect(region, target.region) is not None for target in targets):
                data = _piece(region, targets, reread)
                if _digest(data, recorded) != recorded:
                    return targets, False
    return targets, True


def _targets(shape: tuple[int, ...], dtype: np.dtype, placement: Placement, buffers: BufferPool) -> list[_Target]:
    """Returns the parts of an array that the devices of this process hold, each once; all of it without devices."""
    if not isinstance(placement, jax.sharding.Sharding):
        return [_Target(tuple(slice(0, n) for n in shape), buffers.take(shape, dtype), [])]
    devices: dict[Any, list[Any]] = {}  # slices are not hashable before Python 3.12
    for device, index in placement.addressable_devices_indices_map(shape).items():
        region = normalize_index(index or (), shape)
        devices.setdefault(tuple((i.start, i.stop) for i in region), []).append(device)
    return [
        _Target(tuple(slice(*i) for i in bounds), buffers.take([stop - start for start, stop in bounds], dtype), group)
        for bounds, group in devices.items()
    ]


def _fill(array: ts.TensorStore, target: _Target) -> None:
    """Reads a part of an array, chunk by chunk: TensorStore holds every chunk that is requested in memory."""
    chunk = tuple(c or n for c, n in zip(array.chunk_layout.read_chunk.shape or (), array.shape, strict=True))
    cuts = [
        [slice(start, start + c) for start in range(i.start - i.start % c, i.stop, c)]
        for i, c in zip(target.region, chunk, strict=True)
    ]
    ahead = _BYTES_AHEAD // (math.prod(chunk) * target.buffer.itemsize)
    for _ in _results((_copy(array, region, target) for region in itertools.product(*cuts)), ahead):
        pass


def _copy(array: ts.TensorStore, chunk: Region, target: _Target) -> Any:
    """Starts to read what a chunk and a target have in common."""
    region = intersect(chunk, target.region) or ()
    source = array[region].translate_to[(0,) * array.rank] if region else array
    return ts.array(target.buffer[relative_to(region, target.region)]).write(source)


def _piece(region: Region, targets: list[_Target], reread: Callable[[], ts.TensorStore]) -> np.ndarray:
    """Returns the values of a region: from the target that contains it, from several, or else from the disk again."""
    for target in targets:
        if contains(target.region, region):
            return target.buffer[relative_to(region, target.region)]
    values = np.empty([i.stop - i.start for i in region], targets[0].buffer.dtype)
    copied = 0
    for target in targets:
        common = intersect(region, target.region)
        if common is not None:
            part = target.buffer[relative_to(common, target.region)]
            values[relative_to(common, region)] = part
            copied += part.size
    return values if copied == values.size else reread()[region].read().result()


def _digest(data: np.ndarray, recorded: int | str) -> int | str:
    """Returns the checksum of the recorded kind: format 1 had SHA-256 of the complete array."""
    if isinstance(recorded, str):
        return hashlib.sha256(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data).hexdigest()
    return checksum(data)


def _place(shape: tuple[int, ...], placement: Placement, targets: list[_Target]) -> jax.Array | np.ndarray:
    """Returns an array on its devices; on a CPU it is the memory that it was read into."""
    if isinstance(placement, jax.sharding.Sharding):
        shards = [
            jax.device_put(target.buffer, SingleDeviceSharding(device, memory_kind=placement.memory_kind))
            for target in targets
            for device in target.devices
        ]
        return jax.make_array_from_single_device_arrays(shape, placement, shards)
    return jax.device_put(targets[0].buffer) if placement is None else targets[0].buffer
