"""Arrays of a checkpoint, read with TensorStore: every process its own shards, each byte copied once and checked."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jlora.io._error import CheckpointError
from jlora.io._pieces import Box, checksum, grid, inside, overlap, plain, within

HOST = "host"  # in place of a sharding: a numpy array
Place: TypeAlias = jax.sharding.Sharding | str | None  # None is the default device, to which nothing is committed

_THREADS = 4
# Files are mapped, so that no copy is made but the one into the array itself.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "file_io_mode": {"mode": "memmap"}}


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
    found, altered = {}, []
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, place in places.items():
            try:
                found[name] = _read(folder, name, records[name], place, context, pool, altered)
            except Exception as error:  # TensorStore's own errors have no class of their own
                raise CheckpointError(
                    f"The array {name!r} in {folder} is missing or damaged: {_short(error)} Use an earlier checkpoint."
                ) from error
    if altered:
        raise CheckpointError(
            f"Arrays in {folder} were altered after they were written. Use an earlier checkpoint.\n  "
            + "\n  ".join(dict.fromkeys(altered))
        )
    return found


def _read(
    folder: Path,
    name: str,
    record: Any,
    place: Place,
    context: ts.Context,
    pool: ThreadPoolExecutor,
    altered: list[str],
) -> Any:
    shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
    whole = tuple(slice(0, n) for n in shape)
    targets: dict[Any, list[jax.Device]] = {_key(whole): []}
    if isinstance(place, jax.sharding.Sharding):
        targets = {}
        for device, index in place.addressable_devices_indices_map(shape).items():
            targets.setdefault(_key(plain(index or (), shape)), []).append(device)
    outs = [(tuple(slice(*pair) for pair in key), _empty(key, dtype)) for key in targets]
    if all(shape):
        store = ts.open(_spec(folder, name), context=context, open=True, read=True).result()
        if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
            raise CheckpointError(f"recorded as {dtype.name}{shape}, found {store.dtype.name}{tuple(store.shape)}.")
        jobs = _jobs(record, store, [box for box, _ in outs])
        if not all(pool.map(lambda job: _fill(store, dtype, outs, *job), jobs)):
            altered.append(f"{name}: {dtype.name}{shape}")
    hosts = [out for _, out in outs]
    if isinstance(place, jax.sharding.Sharding):
        shards = [jax.device_put(out, d) for out, devices in zip(hosts, targets.values(), strict=True) for d in devices]
        return jax.make_array_from_single_device_arrays(shape, place, shards)
    return hosts[0] if place == HOST else jax.device_put(hosts[0])


def _jobs(record: Any, store: Any, targets: list[Box]) -> list[tuple[Box, list[tuple[Box, Any]]]]:
    """What to read at a time, with the sums of what is in it.

    Where bytes are stored as they are that is a piece. What is compressed is taken a shard at a time, for that is how
    it was written.
    """
    pieces = grid(record["shape"], record["shard"], record["piece"])
    known = list(zip(pieces, record["sums"], strict=True))
    if store.spec().to_json()["metadata"]["compressor"] is None:
        jobs = [(box, [(box, recorded)]) for box, recorded in known]
    else:
        units = grid(record["shape"], record["shard"])
        jobs = [(unit, [(box, recorded) for box, recorded in known if inside(box, unit)]) for unit in units]
    return [job for job in jobs if any(overlap(job[0], target) is not None for target in targets)]


def _fill(
    store: Any, dtype: np.dtype, outs: list[tuple[Box, np.ndarray]], box: Box, known: list[tuple[Box, Any]]
) -> bool:
    """Reads a box into every target that shares some of it; says whether its sums are right."""
    owner = next((k for k, (target, _) in enumerate(outs) if inside(box, target)), None)
    buffer = None if owner is None else outs[owner][1][within(box, outs[owner][0])]
    if buffer is None or not buffer.flags.c_contiguous:
        owner, buffer = None, np.empty([b.stop - b.start for b in box], dtype)
    source = store[box]
    ts.array(buffer).write(source.translate_to[(0,) * len(box)] if box else source).result()
    for k, (target, out) in enumerate(outs):
        both = overlap(box, target)
        if both is not None and k != owner:
            out[within(both, target)] = buffer[within(both, box)]
    return all(_sum(buffer[within(piece, box)], recorded) == recorded for piece, recorded in known)


def _sum(data: np.ndarray, recorded: Any) -> Any:
    """The sum of the recorded kind: format 1 had SHA-256."""
    if isinstance(recorded, str):
        return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
    return checksum(data)


def _spec(folder: Path, name: str) -> dict[str, Any]:
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}


def _key(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((b.start, b.stop) for b in box)


def _empty(key: tuple[tuple[int, int], ...], dtype: np.dtype) -> np.ndarray:
    """Memory that starts at a multiple of 64 bytes, which a CPU device takes as it is."""
    shape = [stop - start for start, stop in key]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
