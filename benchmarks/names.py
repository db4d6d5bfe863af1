"""Time and memory of `jlora.peft.infer_names` on a checkpoint of 1 GB, for several layouts of the program.

    python -m benchmarks.names
    python -m benchmarks.names --gigabytes 0.1 --layouts stacked

A new process makes the parameters from the file for each layout, and measures the names alone: seconds, and how far the
resident memory rises above that of the parameters.
"""

from __future__ import annotations

import argparse
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

WIDTH, HIDDEN, WORDS = 1024, 2816, 32000
SHAPES = {
    **{f"self_attn.{name}_proj": (size, WIDTH) for name, size in (("q", WIDTH), ("k", 256), ("v", 256), ("o", WIDTH))},
    **{"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)},
}
LAYOUTS = ("plain", "stacked", "fused", "rounded", "other")


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
    """Prints one row."""
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
    extra = (peak[0] - before) / 1e6
    print(
        f"| {layout} | {path.stat().st_size / 1e9:.2f} | {seconds:.1f} | {cpu:.1f} | {extra:.0f} | {outcome} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument(
        "--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS, help="how the program holds the weights"
    )
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        measure(options.file, options.layouts[0])
        return
    print(
        "| layout | GB | seconds | CPU seconds | MB above the parameters | result |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, options.gigabytes)
        for layout in options.layouts:
            command = [sys.executable, "-m", "benchmarks.names", "--file", str(path), "--layouts", layout]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
