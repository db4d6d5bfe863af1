"""Fine-tunes with several processes that share a mesh, and goes on exactly where it was when one of them was lost.

python examples/train_multiprocess.py --processes 2 --tiny     # starts both here; kill one, and start it again

On a cluster, the same on every machine, each with a number of its own:

python examples/train_multiprocess.py --processes 2 --coordinator 10.0.0.1:1234 --process-id 0
python examples/train_multiprocess.py --processes 2 --coordinator 10.0.0.1:1234 --process-id 1

The processes find each other through `jax.distributed`, on CPUs their collectives go through gloo. Of every batch each
reads the rows of its own devices, and of every checkpoint it writes what they hold: one checkpoint, in a folder that
all of them see. `--devices` is how many a process has, `--mesh` is of all of them.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

import assets
import devices
import jlora
import resume


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    parser = devices.arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="how many in all (default: 2)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; without, all start here")
    parser.add_argument("--process-id", type=int, help="which of them this is, from 0")
    parser.add_argument("--mesh", help="devices along data x model, such as 2x1 (default: all along data)")
    parser.add_argument("--folder", type=Path, default=Path("runs/processes"), help="of the checkpoints")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints (default: 10)")
    options = parser.parse_args(args)
    if (options.coordinator is None) != (options.process_id is None):
        parser.error("--coordinator and --process-id go together")
    return options


def train(options: argparse.Namespace) -> list[float]:
    """The losses of the steps that were done here, from the latest checkpoint in the folder if there is one."""
    devices.simulate(options.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, options.processes, options.process_id)
    mesh = devices.mesh(options.mesh or f"{jax.device_count()}x1")
    job = devices.job(options)
    layout = devices.Layout.of(job, mesh, options.batch, options.accumulate)
    variables, trainable, state = layout.start(job)
    step = layout.step(job, options.accumulate, trainable, state)
    done, losses = 0, []
    checkpoints = resume.manager(options.folder)  # closed only where all went well: it waits for every process
    latest = checkpoints.latest_step()
    if latest is not None:
        here = options.folder / str(latest)
        rest = jlora.load_state(here, {"head": trainable["head"], "optimiser": state, "step": 0})
        trainable = {"adapter": jlora.load(here, params=variables), "head": rest["head"]}
        state, done = rest["optimiser"], rest["step"]
    for number, rows in zip(range(1, options.steps + 1), devices.batches(job, options), strict=False):
        if number <= done:  # the number of a step is the position in the data
            continue
        trainable, state, value = step(trainable, state, variables, *layout.batch(job.train, *rows))
        losses.append(devices.told(number, value))
        if number % options.every == 0 or number == options.steps:
            rest = {"head": trainable["head"], "optimiser": state, "step": number}
            items = jlora.checkpoint_args(trainable["adapter"], rest, params=variables)
            checkpoints.save(number, args=ocp.args.Composite(**items), metrics={"loss": losses[-1]})
    checkpoints.close()
    return losses


def member(options: argparse.Namespace) -> int:
    """One of the processes."""
    try:
        train(options)
    except (devices.LayoutError, assets.AssetError, jlora.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # all of them end so, and none waits for the others
    except jax.errors.JaxRuntimeError as error:
        print(f"{lost('another process', options.folder)}\n{error}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would wait for the process that was lost
    return 0


def lost(which: str, folder: Path) -> str:
    steps = [int(found.name) for found in folder.glob("*") if found.name.isdigit()]
    kept = f"All until step {max(steps)} is kept" if steps else "There is no checkpoint yet"
    return f"error: {which} was lost. {kept}: start all processes with the same command, and they go on from there."


def launch(options: argparse.Namespace) -> int:
    """Starts all processes on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], f"--coordinator={address}"]
    return watch([subprocess.Popen([*command, f"--process-id={k}"]) for k in range(options.processes)], options.folder)


def watch(started: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """Waits for all processes, or until one ends otherwise than it should, which ends the others."""
    try:
        while not all(process.poll() == 0 for process in started):
            ended = {k: code for k, process in enumerate(started) if (code := process.poll())}
            if ended:
                number, code = min(ended.items(), key=lambda item: item[1])  # signals are negative
                if code != 2:  # which has been told
                    print(lost(f"process {number} (exit code {code})", folder), file=sys.stderr)
                return 2 if code == 2 else 1
            time.sleep(0.1)
        return 0
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    try:
        options = arguments()
        sys.exit(launch(options) if options.process_id is None else member(options))
    except KeyboardInterrupt:
        sys.exit("interrupted")
