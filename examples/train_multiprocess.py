"""Fine-tunes with several processes on one mesh, and continues exactly from the last checkpoint if one is lost.

python examples/train_multiprocess.py --processes 2 --tiny     # starts both here; kill one, and start again

On a cluster, run the same command on every machine, with another process id on each:

python examples/train_multiprocess.py --processes 2 --coordinator 10.0.0.1:1234 --process-id 0
python examples/train_multiprocess.py --processes 2 --coordinator 10.0.0.1:1234 --process-id 1

The processes connect through `jax.distributed`; on CPUs their collectives use gloo. Each process reads the rows of its
own devices from every batch and writes their arrays to every checkpoint, in a folder that all processes share.
`--devices` is the number of devices of one process, `--mesh` the mesh of all processes.
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
    """The options, checked."""
    parser = devices.arguments(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (default: start all here)")
    parser.add_argument("--process-id", type=int, help="number of this process, from 0")
    parser.add_argument("--mesh", help="devices along data x model, such as 2x1 (default: all along data)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/processes"), help="of the checkpoints (default: runs/processes)"
    )
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints (default: 10)")
    options = parser.parse_args(args)
    if (options.coordinator is None) != (options.process_id is None):
        parser.error("--coordinator and --process-id must be given together")
    return options


def train(options: argparse.Namespace) -> list[float]:
    """Trains from the latest checkpoint in the folder if there is one; returns the losses of the steps that it ran."""
    devices.simulate(options.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, options.processes, options.process_id)
    mesh = devices.mesh(options.mesh or f"{jax.device_count()}x1")
    job = devices.job(options)
    layout = devices.Layout.of(job, mesh, options.batch, options.accumulate)
    variables, trainable, state = layout.start(job)
    step = layout.step(job, options.accumulate, trainable, state)
    done, losses = 0, []
    checkpoints = resume.manager(options.folder)  # closed only after success: closing waits for every process
    latest = checkpoints.latest_step()
    if latest is not None:
        checkpoint = options.folder / str(latest)
        rest = jlora.load_state(checkpoint, {"head": trainable["head"], "optimiser": state, "step": 0})
        trainable = {"adapter": jlora.load(checkpoint, params=variables), "head": rest["head"]}
        state, done = rest["optimiser"], rest["step"]
    for number, rows in zip(range(1, options.steps + 1), devices.batches(job, options), strict=False):
        if number <= done:  # the number of a step is the position in the data
            continue
        trainable, state, value = step(trainable, state, variables, *layout.batch(job.train, *rows))
        losses.append(devices.report(number, value))
        if number % options.every == 0 or number == options.steps:
            rest = {"head": trainable["head"], "optimiser": state, "step": number}
            items = jlora.checkpoint_args(trainable["adapter"], rest, params=variables)
            checkpoints.save(number, args=ocp.args.Composite(**items), metrics={"loss": losses[-1]})
    checkpoints.close()
    return losses


def member(options: argparse.Namespace) -> int:
    """Runs one of the processes; returns its exit code."""
    try:
        train(options)
    except (devices.LayoutError, assets.AssetError, jlora.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # all processes fail in this way, and none may wait for the others
    except jax.errors.JaxRuntimeError as error:
        print(f"{loss_message('another process', options.folder)}\n{error}", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the lost process
    return 0


def loss_message(process: str, folder: Path) -> str:
    """The error for a lost process, with the step from which a restart continues."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    state = f"All until step {max(steps)} is kept" if steps else "There is no checkpoint yet"
    return f"error: {process} was lost. {state}: start all processes with the same command to continue from there."


def launch(options: argparse.Namespace) -> int:
    """Starts all processes on this machine."""
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        address = f"localhost:{unused.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], f"--coordinator={address}"]
    return watch([subprocess.Popen([*command, f"--process-id={k}"]) for k in range(options.processes)], options.folder)


def watch(started: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """Waits for all processes; if one fails, ends the others. Returns the exit code."""
    try:
        while not all(process.poll() == 0 for process in started):
            ended = {k: code for k, process in enumerate(started) if (code := process.poll())}
            if ended:
                number, code = min(ended.items(), key=lambda item: item[1])  # signals are negative
                if code != 2:  # then the process has printed its error
                    print(loss_message(f"process {number} (exit code {code})", folder), file=sys.stderr)
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
