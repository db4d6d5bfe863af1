"""One training step of the same transformer with every LoRA library for JAX, all in turns.

    python -m benchmarks.peers            # two cores, about ten minutes
    python -m benchmarks.peers --quick    # small sizes; fails if the compiled costs of jlora have grown

Each library has a process in an environment of its own (`_peers/environments.py`). The processes stay alive and run a
step when it is their turn; each ratio is the median over rounds of the ratios of one round.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from benchmarks import _measure
from benchmarks._measure import Bar
from benchmarks._peers import environments
from benchmarks._peers.environments import JLORA, PEERS, Peer

RESULT = _measure.RESULTS / "peers.json"
SIZES = {"layers": 4, "width": 512, "length": 256, "batch": 4, "rank": 16, "vocabulary": 8192}
QUICK = SIZES | {"layers": 2, "width": 512, "length": 64, "batch": 2, "vocabulary": 512}
BY_HAND, FULL = Peer("by hand", "by_hand"), Peer("full fine-tuning", "full")
# lorax needs a release of JAX that has no `optax` of today, and another compiler.
COMPARED = (JLORA, BY_HAND, FULL, *(peer for peer in PEERS if peer.name != "lorax"))


class Process:
    """A library's process, and what its compiler says."""

    def __init__(self, peer: Peer, sizes: dict[str, int]) -> None:
        flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
        command = [environments.python(peer), "-m", "benchmarks._peers.step", peer.module, *flags]
        variables = environments.variables() | {"XLA_FLAGS": ""}
        self.pipe = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables, cwd=environments.ROOT
        )
        self.row: dict[str, Any] = json.loads(self.read())

    def read(self) -> str:
        assert self.pipe.stdout is not None
        return self.pipe.stdout.readline()

    def turn(self) -> float:
        """The seconds of one step."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.write("\n")
        self.pipe.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        """Ends the process, and notes its peak memory."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.close()
        self.row["peak_bytes"] = int(self.read())
        self.pipe.wait()


def cost_bars(rows: dict[str, Any]) -> list[Bar]:
    """Compiled costs of jlora against by hand and full fine-tuning."""
    ours, hand, full = rows[JLORA.name], rows[BY_HAND.name], rows[FULL.name]
    return [
        Bar("FLOPs / by hand", ours["flops"] / hand["flops"], 1.005),
        Bar("temporary bytes / by hand", ours["temp_bytes"] / hand["temp_bytes"], 1.0),
        Bar("FLOPs / full fine-tuning", ours["flops"] / full["flops"], 0.70),
    ]


def time_bars(seconds: dict[str, list[float]], width: int) -> list[Bar]:
    """Times of jlora against each of the others."""
    limits = {BY_HAND.name: 1.03} | {FULL.name: 0.75 if width >= 512 else 1.0}
    others = [name for name in seconds if name != JLORA.name]
    return [
        Bar(f"wall time / {name}", _measure.ratio(seconds, JLORA.name, name), limits.get(name, 1.0)) for name in others
    ]


def table() -> str:
    """The rows of the saved results."""
    rows = json.loads(RESULT.read_text())["libraries"]
    body = [
        [
            name,
            _measure.number(row["flops"] / 1e9, 2),
            _measure.number(row["temp_bytes"] / 1e6, 1),
            _measure.number(row["compile_seconds"], 1),
            _measure.number(row["seconds"]),
            _measure.number(row["of_jlora"], 2),
            f"{row['peak_bytes'] / 1e6:.0f}",
        ]
        for name, row in rows.items()
    ]
    header = ["step", "GFLOPs", "temporary MB", "compile s", "step s", "of jlora's", "process MB"]
    return _measure.table(header, body)


def main() -> None:
    """Compiles all steps, runs them in turns, and saves and prints the rows."""
    parser = _measure.parser(__doc__, "peers.json")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--quick", action="store_true", help="small sizes, jlora, by hand and full, no times")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"(default: {value})")
    options = parser.parse_args()
    defaults = QUICK if options.quick else SIZES
    given = {name: getattr(options, name) for name in SIZES}
    sizes = {name: defaults[name] if value is None else value for name, value in given.items()}
    peers = COMPARED[:3] if options.quick else COMPARED
    processes = {peer.name: Process(peer, sizes) for peer in peers}
    rounds = 0 if options.quick else options.rounds
    seconds = _measure.interleave({name: process.turn for name, process in processes.items()}, rounds)
    for name, process in processes.items():
        process.close()
        process.row |= {"seconds": _measure.median(seconds[name]), "rounds": seconds[name]}
        process.row["of_jlora"] = _measure.ratio(seconds, name, JLORA.name) if rounds else None
    rows = {name: process.row for name, process in processes.items()}
    bars = cost_bars(rows) + (time_bars(seconds, sizes["width"]) if rounds else [])
    if rounds:
        verdict = [asdict(bar) | {"passed": bar.passed} for bar in bars]
        result = {"environment": environments.machine(), "sizes": sizes, "libraries": rows, "bars": verdict}
        _measure.save(options.out, result)
    print(_measure.verdicts(bars))
    if options.quick and not all(bar.passed for bar in bars):
        sys.exit(1)


if __name__ == "__main__":
    main()
