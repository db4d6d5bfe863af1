"""Time and memory of `jlora.peft.infer_names` on a checkpoint of 1 GB, for several layouts of the program.

    python -m benchmarks.names
    python -m benchmarks.names --gigabytes 0.1 --layouts stacked --out names.json

A new process makes the parameters from the file for each layout, and measures the names alone: seconds, and how far the
resident memory rises above that of the parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import jlora
from benchmarks import _measure

WIDTH, HIDDEN, WORDS = 1024, 2816, 32000
SHAPES = {
    **{f"self_attn.{name}_proj": (size, WIDTH) for name, size in (("q", WIDTH), ("k", 256), ("v", 256), ("o", WIDTH))},
    **{"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)},
}
LAYOUTS = {
    "plain": "a transposed kernel for each tensor",
    "stacked": "the same with all layers in one array",
    "fused": "query, key and value in one kernel, gate and up in one, all layers in one array",
    "rounded": "rounded to bfloat16",
    "other": "another model",
}


def write_checkpoint(path: Path, gigabytes: float) -> None:
    """A file with as many layers as the size allows, in float32."""
    rng = np.random.default_rng(0)
    per_layer = 4 * sum(out * width for out, width in SHAPES.values())
    layers = max(int((gigabytes * 1e9 - 4 * WORDS * WIDTH) / per_layer), 2)
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in SHAPES.items()}
    shapes["model.embed_tokens.weight"] = (WORDS, WIDTH)
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{name}.weight" for i in range(layers) for name in ("input_layernorm", "norm")]
    save_file(tensors | {name: np.ones(WIDTH, np.float32) for name in norms}, path)


def parameters(tensors: dict[str, np.ndarray], layout: str) -> Any:
    """The weights as a program holds them."""
    count = len({name.split(".")[2] for name in tensors if ".layers." in name})

    def layer(i: int) -> dict[str, Any]:
        def kernel(name: str) -> np.ndarray:
            return np.ascontiguousarray(tensors[f"model.layers.{i}.{name}.weight"].T)

        norms = {name: {"scale": tensors[f"model.layers.{i}.{name}.weight"]} for name in ("input_layernorm", "norm")}
        if layout != "fused":
            return {name: {"kernel": kernel(name)} for name in SHAPES} | norms
        qkv = np.concatenate([kernel(f"self_attn.{name}_proj") for name in "qkv"], 1)
        gate_up = np.stack([kernel(f"mlp.{name}_proj") for name in ("gate", "up")], 1)
        rest = {name: {"kernel": kernel(name)} for name in ("self_attn.o_proj", "mlp.down_proj")}
        return rest | {"qkv": {"kernel": qkv}, "gate_up": {"kernel": gate_up}} | norms

    layers: Any = [layer(i) for i in range(count)]
    if layout in ("stacked", "fused"):
        layers = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    params = {"embed": {"embedding": tensors["model.embed_tokens.weight"]}, "layers": layers}
    if layout == "rounded":
        return jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), params)
    return jax.tree.map(lambda leaf: leaf + np.float32(1), params) if layout == "other" else params


def resident() -> float:
    """The resident memory of this process in bytes."""
    return 4096.0 * int(Path("/proc/self/statm").read_text().split()[1])


def measure(path: Path, layout: str) -> None:
    """Prints the figures of one layout as JSON."""
    params = parameters(load_file(path), layout)
    before, peak, is_done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        names = jlora.peft.infer_names(params, path)
        outcome = "complete" if names.complete else f"{len(names.ambiguous) + len(names.unmatched)} open"
    except ValueError:
        outcome = "refused"
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    is_done.set()
    watcher.join()
    figures = {"bytes": path.stat().st_size, "seconds": seconds, "cpu_seconds": cpu, "outcome": outcome}
    print(json.dumps(figures | {"peak_bytes": peak[0] - before}), flush=True)


def table() -> str:
    """The rows of the saved results."""
    rows = json.loads((_measure.RESULTS / "names.json").read_text())["layouts"]
    body = []
    for layout, runs in rows.items():
        seconds = [run["cpu_seconds"] for run in runs]
        memory = f"{max(run['peak_bytes'] for run in runs) / 1e6:.0f} MB"
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        body.append([LAYOUTS[layout], f"{statistics.median(seconds):.1f}", spread, memory, runs[0]["outcome"]])
    header = ["layout of the program", "CPU seconds", "lowest to highest", "memory above that of the parameters"]
    return _measure.table([*header, "names"], body)


def main() -> None:
    """Makes the checkpoint, measures each layout in a process of its own, prints and writes."""
    parser = _measure.parser(__doc__, "names.json")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each layout (default: 3)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument(
        "--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="how the program holds the weights"
    )
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        measure(options.file, options.layouts[0])
        return
    layouts: dict[str, list[dict[str, Any]]] = {layout: [] for layout in options.layouts}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, options.gigabytes)
        for layout in options.rounds * options.layouts:
            command = [sys.executable, "-m", "benchmarks.names", "--file", str(path), "--layouts", layout]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(layout, run.stdout, flush=True)
            layouts[layout].append(json.loads(run.stdout))
    recorded = {"gigabytes": options.gigabytes, "rounds": options.rounds}
    _measure.save(options.out, {"environment": _measure.environment(), "options": recorded, "layouts": layouts})


if __name__ == "__main__":
    main()
