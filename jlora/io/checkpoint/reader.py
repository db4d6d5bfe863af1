"""Arrays of a checkpoint: every process reads its own shards, each byte copied once and checked.

What is compressed is read with TensorStore.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jlora.io.checkpoint import ocdbt_index as _index
from jlora.io.checkpoint import raw_chunks as _raw
from jlora.io.checkpoint.checksums import Box, checksum, grid, inside, overlap, plain, within
from jlora.io.checkpoint.errors import CheckpointError

HOST = "host"  # in place of a sharding: a numpy array
Place = jax.sharding.Sharding | str | None  # None is the default device, with nothing committed to it

_THREADS = 2
_AT_A_TIME = 1 << 30  # bytes that are read before any of them go to their devices
_PAGE = 2 << 20  # bytes of a large page; memory comes several times faster in those
_SLAB = 16 * _PAGE  # bytes that small arrays share
_SMALL = 2 * _PAGE  # bytes of an array that shares none
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "cache_pool#index": {"total_bytes_limit": 128 << 20}}


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
    source: Any  # `_raw.Raw`, a TensorStore, or None where the array is empty
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
    wanted = [name for name in places if all(records[name]["shape"])]
    with _reading(folder, "The index of the arrays"):
        index = _index.read(folder) if wanted else {}
        raw = {name: _raw.find(index, name, records[name]) for name in wanted}
    names = sorted(places, key=lambda name: source.start if (source := raw.get(name)) else ("", 0))
    found: dict[str, Any] = {}
    altered: set[str] = set()
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in _batches(names, records):
            opened = {name: raw[name] or _open(folder, name, context) for name in batch if name in raw}
            room = _Room()
            plans = [_plan(folder, name, records[name], places[name], opened.get(name), room) for name in batch]
            jobs = [job for plan in plans for job in _jobs(plan)]
            share = -(-len(jobs) // _THREADS)  # in order, since that is how disks read fastest
            runs = [jobs[k * share : (k + 1) * share] for k in range(_THREADS)]
            altered = altered.union(*pool.map(lambda run: _fill_all(folder, run), runs))
            found |= _placed(plans)
    if altered:
        raise CheckpointError(
            f"Arrays in {folder} were altered after they were written. Use an earlier checkpoint.\n  "
            + "\n  ".join(
                f"{name}: {records[name]['dtype']}{tuple(records[name]['shape'])}" for name in sorted(altered)
            )
        )
    return found


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
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Errors inside are errors of one array, say; TensorStore's own have no class of their own."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{what} in {folder} is missing or damaged: {reason}. Use an earlier checkpoint."
        ) from error


def _open(folder: Path, name: str, context: ts.Context) -> Any:
    """Begins to open an array."""
    files = {"driver": "file", "path": f"{folder}/"}
    kvstore = {"driver": "ocdbt", "base": files, "path": f"{name}/", "cache_pool": "cache_pool#index"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    with _reading(folder, f"The array {name!r}"):
        return ts.open(spec, context=context, open=True, read=True)


def _plan(folder: Path, name: str, record: Any, place: Place, source: Any, room: "_Room") -> _Plan:
    shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
    if isinstance(source, ts.Future):
        with _reading(folder, f"The array {name!r}"):
            source = source.result()
            if (source.shape, source.dtype.numpy_dtype) != (shape, dtype):
                raise ValueError(f"recorded as {dtype.name}{shape}, found {source.dtype.name}{tuple(source.shape)}")
    parts: dict[Any, list[Any]] = {}
    if isinstance(place, jax.sharding.Sharding):
        for device, index in place.addressable_devices_indices_map(shape).items():
            box = plain(index or (), shape)
            parts.setdefault(tuple((b.start, b.stop) for b in box), []).append(device)
    else:
        parts[tuple((0, n) for n in shape)] = []
    boxes = [(tuple(slice(*pair) for pair in part), devices) for part, devices in parts.items()]
    targets = [_Target(box, room.take(box, dtype), devices) for box, devices in boxes]
    return _Plan(name, record, place, source, targets)


def _jobs(plan: _Plan) -> list[Job]:
    """What is read here of an array: pieces or, of what is compressed, shards, for that is how it was written."""
    if plan.source is None:
        return []
    record = plan.record
    shape, shard, piece = (tuple(record[field]) for field in ("shape", "shard", "piece"))
    known = list(zip(grid(shape, shard, piece), record["sums"], strict=True))
    units = [(box, [(box, recorded)]) for box, recorded in known]
    if not isinstance(plan.source, _raw.Raw):
        shards = grid(shape, shard)
        units = [(shard, [(box, recorded) for box, recorded in known if inside(box, shard)]) for shard in shards]
    return [(plan, *unit) for unit in units if any(overlap(unit[0], target.box) is not None for target in plan.targets)]


def _fill_all(folder: Path, jobs: Sequence[Job]) -> set[str]:
    """The names of the arrays whose sums are wrong, of one thread's jobs."""
    with contextlib.closing(_raw.Files()) as files:
        return {plan.name for plan, box, known in jobs if not _fill(folder, files, plan, box, known)}


def _fill(folder: Path, files: _raw.Files, plan: _Plan, box: Box, known: list[tuple[Box, Any]]) -> bool:
    """Reads a box into every target that shares some of it; says whether its sums are right."""
    owner = next((target for target in plan.targets if inside(box, target.box)), None)
    buffer = None if owner is None else owner.out[within(box, owner.box)]
    if buffer is None or not buffer.flags.c_contiguous:
        owner, buffer = None, np.empty([b.stop - b.start for b in box], jnp.dtype(plan.record["dtype"]))
    with _reading(folder, f"The array {plan.name!r}"):
        if isinstance(plan.source, _raw.Raw):
            ((_, recorded),) = known
            right = plan.source.read(files, box, lambda fill: _sum(buffer, recorded, fill)) == recorded
        else:
            source = plan.source[box]
            ts.array(buffer).write(source.translate_to[(0,) * len(box)] if box else source).result()
            right = all(_sum(buffer[within(piece, box)], recorded) == recorded for piece, recorded in known)
    for target in plan.targets:
        both = None if target is owner else overlap(box, target.box)
        if both is not None:
            target.out[within(both, target.box)] = buffer[within(both, box)]
    return right


def _placed(plans: list[_Plan]) -> dict[str, Any]:
    """The arrays on their devices; on a CPU they are the memory that was read into."""
    host = {plan.name: plan.targets[0].out for plan in plans if not isinstance(plan.place, jax.sharding.Sharding)}
    free = [plan.name for plan in plans if plan.place is None]
    found = host | dict(zip(free, jax.device_put([host[name] for name in free]), strict=True))
    for plan in plans:
        if isinstance(plan.place, jax.sharding.Sharding):
            shards = [jax.device_put(target.out, device) for target in plan.targets for device in target.devices]
            shape = tuple(plan.record["shape"])
            found[plan.name] = jax.make_array_from_single_device_arrays(shape, plan.place, shards)
    return found


def _sum(data: np.ndarray, recorded: Any, fill: Callable[[np.ndarray], None] | None = None) -> Any:
    """The sum of the recorded kind, of what `fill` writes there: format 1 had SHA-256."""
    if not isinstance(recorded, str):
        return checksum(data, fill)
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if fill is not None:
        fill(raw)
    return hashlib.sha256(raw.data).hexdigest()


class _Room:
    """Memory for arrays, that of small ones in slabs, which last as long as any array in them."""

    def __init__(self) -> None:
        self.left = np.empty(0, np.uint8)

    def take(self, box: Box, dtype: np.dtype) -> np.ndarray:
        """Memory that starts at a multiple of 64 bytes, which a CPU device takes as it is."""
        shape = [b.stop - b.start for b in box]
        size = math.prod(shape) * dtype.itemsize
        whole = size + -size % 64
        if whole >= _SMALL:
            return _aligned(size).view(dtype).reshape(shape)
        if whole > self.left.size:
            self.left = _aligned(_SLAB)
        out, self.left = self.left[:size], self.left[whole:]
        return out.view(dtype).reshape(shape)


def _aligned(size: int) -> np.ndarray:
    raw = np.empty(_PAGE + size, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + size]
