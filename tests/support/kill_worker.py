"""Saves repeatedly and is killed at random moments: a program for `tests/io/test_durability.py`.

    python -m tests.support.kill_worker FOLDER ROUNDS SEED [bank]

Every round is a process of its own. It saves to `FOLDER/<round>/0`, `1`, ... (odd rounds through Orbax's
`CheckpointManager`), or replaces the bank at `FOLDER/<round>/bank`, until it receives SIGKILL. It is forked from this
process, which has imported the modules and started no threads.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

import jlora


def adapter(number: int) -> dict:
    """Returns an adapter of a few KiB whose values identify the save."""
    update = jlora.Update(
        factors={"a": np.full((64, 2), number, np.float32), "b": np.full((2, 48), -number, np.float32)},
        method=jlora.LoRA(rank=2),
        roles=("in", "out"),
        shape=(64, 48),
    )
    return {"first": update, "second": update}


def save_forever(folder: Path, ready: int) -> None:
    """Saves until it is killed, and writes to `ready` after the first adapter is complete."""
    jlora.save(folder / "0", adapter(0))
    os.write(ready, b"x")
    for number in itertools.count(1):
        jlora.save(folder / str(number), adapter(number))


def manage_forever(folder: Path, ready: int) -> None:
    """Does the same with saves in the background, and removes old checkpoints."""
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for number in itertools.count():
            items = jlora.checkpoint_args(adapter(number), {"step": number})
            manager.save(number, args=ocp.args.Composite(**items))
            if number == 1:  # the first save is complete
                os.write(ready, b"x")


def replace_bank_forever(folder: Path, ready: int) -> None:
    """Saves one bank after the other to one folder."""
    for number in itertools.count():
        jlora.bank.save(folder / "bank", jlora.bank.stack({"x": adapter(number + 1), "y": adapter(2 * number + 1)}))
        if number == 1:
            os.write(ready, b"x")


def main() -> None:
    folder, rounds, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    for number in range(rounds):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            forever = replace_bank_forever if "bank" in sys.argv else manage_forever if number % 2 else save_forever
            forever(folder / str(number), write)
        os.close(write)
        assert os.read(read, 1) == b"x", "the process ended by itself"
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)


if __name__ == "__main__":
    main()
