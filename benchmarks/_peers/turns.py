"""Processes of libraries that take turns: one for each library, which runs steps when it is asked to."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import _measure
from benchmarks._peers import environments
from benchmarks._peers.environments import Peer

TURN_SECONDS = 0.2  # a turn is of as many steps as the first library runs in this time
SHORT_SECONDS, MORE_ROUNDS = 0.05, 3  # steps shorter than this get so many times the rounds, since they vary more


class StoppedError(RuntimeError):
    """The last words of a library's process that ended before its time."""


class Process:
    """A library's process, which imports the library while others import theirs.

    Raises:
        NotInstalledError: if the library's environment cannot be made.
    """

    def __init__(self, peer: Peer, sizes: dict[str, int]) -> None:
        command = [environments.python(peer), "-m", "benchmarks._peers.step", peer.module, json.dumps(sizes)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `kill`
        self.pipe = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environments.variables() | {"XLA_FLAGS": ""},
            cwd=environments.ROOT,
        )

    def read(self) -> str:
        """The next line of the process.

        Raises:
            StoppedError: if no process answers.
        """
        assert self.pipe.stdout is not None
        line = self.pipe.stdout.readline()
        if line:
            return line
        self.errors.seek(0)
        words = self.errors.read().strip().splitlines() or [f"the process ended with {self.pipe.wait()}"]
        raise StoppedError(words[-1])

    def ask(self, text: object = "") -> str:
        """The process's answer to a line."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.write(f"{text}\n")
        self.pipe.stdin.flush()
        return self.read()

    def close(self) -> dict[str, Any]:
        """Ends the process; what it knows at its end."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.close()
        row = json.loads(self.read())
        self.pipe.wait()
        return row

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self.pipe.kill()
        self.pipe.wait()
        self.errors.close()


def measure(peers: list[Peer], sizes: dict[str, int], rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The rows of libraries at one size, and why others have none."""
    processes: dict[str, Process] = {}
    missing: dict[str, str] = {}

    def answers(ask: Callable[[Process], str]) -> dict[str, str]:
        out = {}
        for name in [name for name in processes if name not in missing]:
            try:
                out[name] = ask(processes[name])
            except StoppedError as error:
                missing[name] = str(error)
        return out

    try:
        for peer in peers:
            try:
                processes[peer.name] = Process(peer, sizes)
            except environments.NotInstalledError as error:
                missing[peer.name] = str(error)
        answers(Process.read)
        # One compiles at a time, while the others wait.
        rows = {name: json.loads(line) for name, line in answers(Process.ask).items()}
        for name, seconds in timed({name: processes[name] for name in rows}, rounds).items():
            rows[name] |= {"seconds": _measure.median(seconds), "rounds": seconds} | processes[name].close()
    finally:
        for process in processes.values():
            process.kill()
    return rows, missing


def timed(processes: dict[str, Process], rounds: int) -> dict[str, list[float]]:
    """Seconds of one step of each process in every round; each round starts one process later than the one before."""
    names = list(processes)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    first = float(processes[names[0]].ask(1)) if rounds else 0.0
    steps = max(1, round(TURN_SECONDS / first)) if first else 1
    rounds *= MORE_ROUNDS if first < SHORT_SECONDS else 1
    for number in range(-1, rounds) if rounds else ():
        start = number % len(names)
        for name in names[start:] + names[:start]:
            value = float(processes[name].ask(steps))
            if number >= 0:
                seconds[name].append(value)
    return seconds
