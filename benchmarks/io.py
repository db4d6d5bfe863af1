"""Reading a large adapter: `jlora.load` against reading the bytes of its files, and the memory that it takes.

    python -m benchmarks.io

Both read the same files in turns, from the disk (the system is told to forget them first) and again from its cache.
The plain read puts each file into memory, checks nothing and makes no array. The memory is the peak of a process
that loads the adapter and nothing else, beyond what the process had before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
from benchmarks import _measure
from benchmarks._measure import Bar

WIDTH, RANK = 4096, 64
KERNELS = ("query", "key", "value", "out")
FORMS = ("stacked", "unrolled")  # arrays of 128 MiB for a scan of 128 layers, and of 1 MiB for as many layers


def adapter(form: str, size: int) -> dict[str, jlora.Update]:
    """An adapter of `size` bytes of random numbers."""
    layers = max(1, size // (len(KERNELS) * 2 * WIDTH * RANK * 4))
    rng = np.random.default_rng(0)

    def update(*stack: int) -> jlora.Update:
        def random(*shape: int) -> jax.Array:
            return jax.device_put(rng.standard_normal((*stack, *shape), np.float32))

        return jlora.Update(
            factors={"a": random(WIDTH, RANK), "b": random(RANK, WIDTH)},
            method=jlora.LoRA(rank=RANK),
            roles=(*(("stack",) * len(stack)), "in", "out"),
            shape=(*stack, WIDTH, WIDTH),
        )

    if form == "stacked":
        return {f"layers/{name}/kernel": update(layers) for name in KERNELS}
    return {f"layer_{k}/{name}/kernel": update() for k in range(layers) for name in KERNELS}


def files(folder: Path) -> list[Path]:
    return sorted(found for found in folder.rglob("*") if found.is_file())


def forget(folder: Path) -> None:
    """Has the system drop the files from its cache."""
    for file in files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def turns(calls: dict[str, Callable[[], Any]], prepare: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that is not kept; `prepare` runs before each and is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name in sorted(calls, reverse=bool(number % 2)):
            prepare()
            begin = time.perf_counter()
            result = jax.block_until_ready(calls[name]())
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
            del result
    return seconds


def peak(folder: Path) -> int:
    """Bytes by which loading raises the memory of a process."""
    jax.block_until_ready(jax.numpy.ones(3))
    before = highest()
    loaded = jax.block_until_ready(jlora.load(folder))
    after = highest()
    assert loaded
    return after - before


def highest() -> int:
    """The most memory that this process has ever had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measure(form: str, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Times, memory and bars for one form of the adapter."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "adapter"
        made = adapter(form, options.size)
        arrays = jax.tree.leaves(made)
        size, count = sum(a.nbytes for a in arrays), len(arrays)
        begin = time.perf_counter()
        jlora.save(folder, made)
        saving = time.perf_counter() - begin
        del made, arrays
        os.sync()
        calls = {"load": lambda: jlora.load(folder), "read": lambda: [np.fromfile(f, np.uint8) for f in files(folder)]}
        seconds = {
            "disk": turns(calls, lambda: forget(folder), options.rounds),
            "cache": turns(calls, lambda: None, options.rounds),
        }
        stored = sum(file.stat().st_size for file in files(folder))
        command = [sys.executable, "-m", "benchmarks.io", "--peak", str(folder)]
        taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    row = {
        "arrays": count,
        "bytes": size,
        "stored_bytes": stored,
        "peak_bytes": taken,
        "save_seconds": saving,
        **{
            f"{where}_{name}_seconds": statistics.median(times)
            for where, of in seconds.items()
            for name, times in of.items()
        },
        "rounds": seconds,
    }
    return row, [
        Bar("load from disk / reading its bytes", _measure.ratio(seconds["disk"], "load", "read"), 1.2),
        Bar("load from cache / reading its bytes", _measure.ratio(seconds["cache"], "load", "read"), 1.2),
        Bar("peak memory / bytes", taken / size, 1.25),
        Bar("bytes on disk / (1.05 bytes + 64 KiB)", stored / (1.05 * size + 64 * 1024), 1.0),
    ]


def show(form: str, row: dict[str, Any], judged: list[Bar]) -> None:
    """Prints the figures of one form."""
    header = ["from", "load s", "plain read s"]
    body = [[w, *(f"{row[f'{w}_{name}_seconds']:.3f}" for name in ("load", "read"))] for w in ("disk", "cache")]
    what = f"{row['arrays']} arrays, {row['bytes'] / 2**30:.2f} GiB, saved in {row['save_seconds']:.2f} s"
    print(f"\n### {form}: {what}\n\n{_measure.table(header, body)}\n\n{_measure.verdicts(judged)}", flush=True)


def main() -> None:
    """Reads the options, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--size", type=int, default=2**30, help="bytes (default: 1 GiB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "io.json")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak)))
        return
    kept = {k: v for k, v in vars(options).items() if k in ("forms", "size", "rounds")}
    result: dict[str, Any] = {"environment": _measure.environment(), "options": kept}
    for form in options.forms:
        row, judged = measure(form, options)
        show(form, row, judged)
        result[form] = row | {"bars": [asdict(b) | {"passed": b.passed} for b in judged]}
        _measure.save(options.out, result)


if __name__ == "__main__":
    main()
