"""Arrays of a checkpoint, read with TensorStore: every process its own shards, each byte copied once and checked."""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jlora.io._error import CheckpointError
from jlora.io._pieces import Box, checksum, grid, inside, overlap, plain, within

HOST = "host"  # in place of a sharding: a numpy array
Place = jax.sharding.Sharding | str | None  # None is the default device, with nothing committed to it

_THREADS = 4
_AT_A_TIME = 256 << 20  # bytes that are read before any of them go to their devices
_AHEAD = 2 << 20  # bytes that the system is asked for at once
# Files are mapped, so that no copy is made but the one into the array itself, and of the store only its index is kept.
_CONTEXT = {
    "cache_pool": {"total_bytes_limit": 0},
    "cache_pool#index": {"total_bytes_limit": 128 << 20},
    "file_io_mode": {"mode": "memmap"},
}


@dataclasses.dataclass(frozen=True)
class _Target:
    """A part of an array, the memory that it is read into, and the devices that it goes to."""

    box: Box
    out: np.ndarray
    devices: list[Any]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One array that is being read: where it comes from and all that is wanted of it here."""

    name: str
    record: Any
    place: Place
    store: Any
    targets: list[_Target]


Job = tuple[_Plan, Box, list[tuple[Box, Any]]]  # what to read at a time, with the sums of the pieces in it


def read(folder: Path, records: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
    """Reads arrays to where they belong.

    Arguments:
        folder: what Orbax wrote.
        records: by name, what `sums` said of an array.
        places: the names to read, each with its sharding.

    Raises:
        CheckpointError: where an array is missing, of another shape or dtype, or altered; with all that were altered.
    """
    context = ts.Context(_CONTEXT)
    found: dict[str, Any] = {}
    altered: set[str] = set()
    with ThreadPoolExecutor(_THREADS) as pool:
        if len(places) == len(records) and jax.process_count() == 1:
            pool.submit(_announce, folder)
        for names in _batches(places, records):
            opened = {name: _open(folder, name, context) for name in names if all(records[name]["shape"])}
            plans = [_plan(folder, name, records[name], places[name], opened.get(name)) for name in names]
            jobs = [job for plan in plans for job in _jobs(plan)]
            shares = [jobs[k::_THREADS] for k in range(_THREADS)]
            altered = altered.union(*pool.map(lambda share: _fill_all(folder, share), shares))
            found |= {plan.name: _placed(plan) for plan in plans}
    if altered:
        raise CheckpointError(
            f"Arrays in {folder} were altered after they were written. Use an earlier checkpoint.\n  "
            + "\n  ".join(
                f"{name}: {records[name]['dtype']}{tuple(records[name]['shape'])}" for name in sorted(altered)
            )
        )
    return found


def _announce(folder: Path) -> None:
    """Tells the system that all files will be read; what is mapped it fetches in small steps otherwise."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in sorted(found for found in folder.rglob("*") if found.is_file()):
        with file.open("rb") as opened:
            for start in range(0, os.fstat(opened.fileno()).st_size, _AHEAD):
                os.posix_fadvise(opened.fileno(), start, _AHEAD, os.POSIX_FADV_WILLNEED)


def _batches(names: Iterable[str], records: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of arrays that are read together."""
    batch, size = [], 0
    for name in names:
        batch.append(name)
        size += math.prod(records[name]["shape"]) * jnp.dtype(records[name]["dtype"]).itemsize
        if size >= _AT_A_TIME:
            yield batch
            batch, size = [], 0
    yield batch


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Errors inside are errors of one array; TensorStore's own have no class of their own."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CheckpointError(
            f"The array {name!r} in {folder} is missing or damaged: {reason}. Use an earlier checkpoint."
        ) from error


def _open(folder: Path, name: str, context: ts.Context) -> Any:
    """Begins to open an array."""
    files = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": files, "path": f"{name}/", "cache_pool": "cache_pool#index"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    with _reading(folder, name):
        return ts.open(spec, context=context, open=True, read=True)


def _plan(folder: Path, name: str, record: Any, place: Place, opened: Any) -> _Plan:
    shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
    store = None
    if opened is not None:
        with _reading(folder, name):
            store = opened.result()
            if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
                raise ValueError(f"recorded as {dtype.name}{shape}, found {store.dtype.name}{tuple(store.shape)}")
    parts: dict[Any, list[Any]] = {}
    if isinstance(place, jax.sharding.Sharding):
        for device, index in place.addressable_devices_indices_map(shape).items():
            box = plain(index or (), shape)
            parts.setdefault(tuple((b.start, b.stop) for b in box), []).append(device)
    else:
        parts[tuple((0, n) for n in shape)] = []
    boxes = [(tuple(slice(*pair) for pair in part), devices) for part, devices in parts.items()]
    return _Plan(name, record, place, store, [_Target(box, _empty(box, dtype), devices) for box, devices in boxes])


def _jobs(plan: _Plan) -> list[Job]:
    """What is read here of an array: pieces, where its bytes are stored as they are.

    What is compressed is taken a shard at a time, for that is how it was written.
    """
    if plan.store is None:
        return []
    record = plan.record
    known = list(zip(grid(record["shape"], record["shard"], record["piece"]), record["sums"], strict=True))
    units = [(box, [(box, recorded)]) for box, recorded in known]
    if plan.store.codec.to_json().get("compressor") is not None:
        shards = grid(record["shape"], record["shard"])
        units = [(shard, [(box, recorded) for box, recorded in known if inside(box, shard)]) for shard in shards]
    return [(plan, *unit) for unit in units if any(overlap(unit[0], target.box) is not None for target in plan.targets)]


def _fill_all(folder: Path, jobs: list[Job]) -> set[str]:
    """The names of the arrays whose sums are wrong."""
    return {plan.name for plan, box, known in jobs if not _fill(folder, plan, box, known)}


def _fill(folder: Path, plan: _Plan, box: Box, known: list[tuple[Box, Any]]) -> bool:
    """Reads a box into every target that shares some of it; says whether its sums are right."""
    owner = next((target for target in plan.targets if inside(box, target.box)), None)
    buffer = None if owner is None else owner.out[within(box, owner.box)]
    if buffer is None or not buffer.flags.c_contiguous:
        owner, buffer = None, np.empty([b.stop - b.start for b in box], jnp.dtype(plan.record["dtype"]))
    with _reading(folder, plan.name):
        source = plan.store[box]
        ts.array(buffer).write(source.translate_to[(0,) * len(box)] if box else source).result()
    for target in plan.targets:
        both = overlap(box, target.box)
        if both is not None and target is not owner:
            target.out[within(both, target.box)] = buffer[within(both, box)]
    return all(_sum(buffer[within(piece, box)], recorded) == recorded for piece, recorded in known)


def _placed(plan: _Plan) -> Any:
    """The array on its devices; on a CPU it is the memory that was read into."""
    if isinstance(plan.place, jax.sharding.Sharding):
        shards = [jax.device_put(target.out, device) for target in plan.targets for device in target.devices]
        return jax.make_array_from_single_device_arrays(tuple(plan.record["shape"]), plan.place, shards)
    (target,) = plan.targets
    return target.out if plan.place == HOST else jax.device_put(target.out)


def _sum(data: np.ndarray, recorded: Any) -> Any:
    """The sum of the recorded kind: format 1 had SHA-256."""
    if isinstance(recorded, str):
        return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
    return checksum(data)


def _empty(box: Box, dtype: np.dtype) -> np.ndarray:
    """Memory that starts at a multiple of 64 bytes, which a CPU device takes as it is."""
    shape = [b.stop - b.start for b in box]
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
