"""Loading a large adapter: `jlora.load` against Orbax's own restore of the same folder, in time and in memory.

    python -m benchmarks.io

Both read the same folder to the same device, in turns: from the disk (the system drops the files from its cache
before each) and again from the cache. Orbax verifies no checksums; `jlora.load` verifies all. The peak memory is that
of a process that loads the adapter and does nothing else, less what the process had before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import jlora
from benchmarks import _measure
from benchmarks._measure import Bar

WIDTH, RANK = 4096, 64
KERNELS = ("query", "key", "value", "out")
FORMS = ("stacked", "unrolled")  # arrays of 128 MiB for a scan of 128 layers, and of 1 MiB for as many layers


def adapter(form: str, size: int) -> dict[str, jlora.Update]:
    """Returns an adapter of `size` bytes of random numbers."""
    layers = max(1, size // (len(KERNELS) * 2 * WIDTH * RANK * 4))
    rng = np.random.default_rng(0)

    def update(*stack: int) -> jlora.Update:
        def random(*shape: int) -> jax.Array:
            return jax.device_put(rng.standard_normal((*stack, *shape), np.float32))

        return jlora.Update(
            factors={"a": random(WIDTH, RANK), "b": random(RANK, WIDTH)},
            method=jlora.LoRA(rank=RANK),
            roles=("stack", "in", "out") if stack else ("in", "out"),
            shape=(*stack, WIDTH, WIDTH),
        )

    if form == "stacked":
        return {f"layers/{name}/kernel": update(layers) for name in KERNELS}
    return {f"layer_{k}/{name}/kernel": update() for k in range(layers) for name in KERNELS}


def restore(folder: Path) -> Any:
    """Reads the arrays of an adapter with Orbax alone, to the device that `jlora.load` reads them to."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = json.loads((folder / "jlora" / "metadata").read_text())["arrays"]
    restore_args = {name: ocp.ArrayRestoreArgs(sharding=sharding) for name in names}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(arrays=ocp.PyTreeCheckpointHandler())) as checkpointer:
        args = ocp.args.Composite(arrays=ocp.args.PyTreeRestore(restore_args=restore_args))
        return checkpointer.restore(folder, args=args)["arrays"]


READERS: dict[str, Callable[[Path], Any]] = {"jlora": jlora.load, "orbax": restore}


def files(folder: Path) -> list[Path]:
    """Returns all files in a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_from_cache(folder: Path) -> None:
    """Asks the system to drop the files from its cache."""
    for file in files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def in_turns(folder: Path, source: str, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every reader in every round, after one round that is not recorded.

    Arguments:
        folder: what to read.
        source: "disk" or "cache".
        rounds: the number of rounds. The order of the readers changes from one to the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in READERS}
    for number in tqdm(range(-1, rounds), f"reading from {source}"):
        for name in sorted(READERS, reverse=bool(number % 2)):
            if source == "disk":
                drop_from_cache(folder)
            begin = time.perf_counter()
            arrays = jax.block_until_ready(READERS[name](folder))
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
            del arrays
    return seconds


def highest_memory() -> int:
    """Returns the most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def peak(reader: str, folder: Path) -> int:
    """Returns the bytes by which loading raises the memory of a process."""
    jax.block_until_ready(jax.numpy.ones(3))
    before = highest_memory()
    arrays = jax.block_until_ready(READERS[reader](folder))
    after = highest_memory()
    assert arrays
    return after - before


def peaks(folder: Path) -> dict[str, int]:
    """Returns the peak memory of every reader, each measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.io", "--folder", str(folder), "--peak"]
    runs = {name: subprocess.run([*command, name], check=True, capture_output=True, text=True) for name in READERS}
    return {name: int(run.stdout) for name, run in runs.items()}


def measure(form: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Returns times, memory and bars for one form of the adapter."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "adapter"
        saved = adapter(form, options.size)
        arrays = jax.tree.leaves(saved)
        size, count = sum(a.nbytes for a in arrays), len(arrays)
        begin = time.perf_counter()
        jlora.save(folder, saved)
        saving = time.perf_counter() - begin
        del saved, arrays
        os.sync()
        seconds = {source: in_turns(folder, source, options.rounds) for source in ("disk", "cache")}
        stored = sum(file.stat().st_size for file in files(folder))
        memory = peaks(folder)
    row = {
        "arrays": count,
        "bytes": size,
        "stored_bytes": stored,
        "save_seconds": saving,
        "peak_bytes": memory,
        "median_seconds": {
            source: {reader: statistics.median(times) for reader, times in of.items()} for source, of in seconds.items()
        },
        "rounds": seconds,
    }
    return row, [
        *(
            Bar(f"load / Orbax's restore, from {s}", _measure.ratio(seconds[s], "jlora", "orbax"), 1.15)
            for s in seconds
        ),
        Bar("peak memory / bytes of the arrays", memory["jlora"] / size, 1.1),
        Bar("bytes on disk / (1.05 bytes + 64 KiB)", stored / (1.05 * size + 64 * 1024), 1.0),
    ]


def show(form: str, row: Mapping[str, Any], bars: list[Bar]) -> None:
    """Prints the figures of one form."""
    header = ["", *READERS]
    body = [[f"from {s}, s", *(f"{of[r]:.3f}" for r in READERS)] for s, of in row["median_seconds"].items()]
    body.append(["peak memory / bytes", *(f"{row['peak_bytes'][r] / row['bytes']:.3f}" for r in READERS)])
    title = f"{row['arrays']} arrays, {row['bytes'] / 2**30:.2f} GiB, saved in {row['save_seconds']:.2f} s"
    print(f"\n### {form}: {title}\n\n{_measure.table(header, body)}\n\n{_measure.verdicts(bars)}", flush=True)


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--size", type=int, default=2**30, help="bytes (default: 1 GiB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--peak", choices=list(READERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "io.json")
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.folder))
        return
    recorded = {k: v for k, v in vars(options).items() if k in ("forms", "size", "rounds")}
    result: dict[str, Any] = {"environment": _measure.environment(), "options": recorded}
    for form in options.forms:
        row, bars = measure(form, options)
        show(form, row, bars)
        result[form] = row | {"bars": [asdict(bar) | {"passed": bar.passed} for bar in bars]}
        _measure.save(options.out, result)


if __name__ == "__main__":
    main()
