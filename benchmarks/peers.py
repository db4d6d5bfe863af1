"""One training step of the same transformer with every LoRA library for JAX, and with PEFT, in turns.

    python -m benchmarks.peers                             # two cores, about fifteen minutes
    python -m benchmarks.peers --sizes default "rank 1"    # measures these again; the others keep their figures
    python -m benchmarks.peers --resume                    # goes on where a run was stopped
    python -m benchmarks.peers --quick                     # no times; fails if a compiled cost has grown
    python -m benchmarks.peers --quick --write             # commits to the compiled costs of now

Each library has a process in an environment of its own (`_peers/environments.py`). The processes stay alive and run
steps when it is their turn; each ratio is the median over rounds of the ratios of one round. The sizes change one axis
at a time: parameters, tokens, rank. The result file is written after each size.
"""

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from benchmarks import _measure, pages
from benchmarks._peers import quick, report, turns
from benchmarks._peers.environments import JLORA, PEERS, TORCH, Peer

BY_HAND, FULL = Peer(report.BY_HAND, "by_hand"), Peer(report.FULL, "full")
COMPARED = (JLORA, BY_HAND, FULL, *(peer for peer in PEERS if peer.name != "lorax"), TORCH)
LEFT_OUT = {"lorax": "needs a JAX of 2024 (0.4.25), whose compiler is another"}

DEFAULT = {"layers": 2, "width": 512, "length": 128, "batch": 2, "rank": 16, "vocabulary": 2048}
SIZES: dict[str, dict[str, int]] = {
    "default": DEFAULT,
    "1M parameters": DEFAULT | {"width": 192, "vocabulary": 512},
    "31M parameters": DEFAULT | {"layers": 4, "width": 768},
    "105M parameters": DEFAULT | {"layers": 8, "width": 1024},
    "64 tokens": DEFAULT | {"batch": 1, "length": 64},
    "16 x 128 tokens": DEFAULT | {"batch": 16},
    "1 x 2,048 tokens": DEFAULT | {"batch": 1, "length": 2048},
    "rank 1": DEFAULT | {"rank": 1},
    "rank 64": DEFAULT | {"rank": 64},
    "rank 256": DEFAULT | {"rank": 256},
}


def measured(sizes: dict[str, int], peers: list[Peer], rounds: int) -> dict[str, Any]:
    """The result of one size.

    Raises:
        ValueError: if the libraries do not do the same work.
    """
    environment = _measure.environment()  # before the load that this makes
    rows, missing = turns.measure(peers, sizes, rounds)
    report.check_same_work(rows)
    times = {name: row["rounds"] for name, row in rows.items()}
    for name, row in rows.items():
        row["of_by_hand"] = _measure.ratio(times, name, report.BY_HAND) if rounds else None
    bars = report.bars(rows, sizes["width"])
    return {
        "environment": environment,
        "sizes": sizes,
        "libraries": rows,
        "left_out": LEFT_OUT | missing,
        "bars": [asdict(bar) | {"passed": bar.passed} for bar in bars],
    }


def parse(peers: Collection[str]) -> tuple[argparse.Namespace, bool]:
    """The options, and whether the result is that of the pages."""
    parser = _measure.parser(__doc__, "peers.json")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--peers", nargs="+", choices=peers, help="beside jlora and by hand (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="timed (default: 7; three times as many of short steps)")
    parser.add_argument("--resume", action="store_true", help="only the sizes that the result file lacks")
    parser.add_argument("--quick", action="store_true", help="the compiled costs against those of results/costs.json")
    parser.add_argument("--write", action="store_true", help="with --quick: write results/costs.json")
    options = parser.parse_args()
    is_of_pages = options.out == parser.get_default("out")
    if (options.peers or not options.rounds) and is_of_pages and not options.quick:
        parser.error("the result file holds the times of all: with --peers or --rounds 0 pass --out with another file.")
    return options, is_of_pages


def main() -> None:
    """Reads the options, measures, saves each size at once, and prints the bars that are missed."""
    peers = {peer.name: peer for peer in COMPARED}
    options, is_of_pages = parse(peers)
    if options.quick:
        sys.exit(quick.main(options.write))
    chosen = [peer for peer in COMPARED if peer in COMPARED[:2] or peer.name in (options.peers or peers)]
    saved = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    kept = {name: row for name, row in saved.items() if options.resume or name not in options.sizes}
    packages = {peer.name: [*peer.packages, *peer.alone] for peer in chosen}
    given = {"environment": _measure.environment(), "packages": packages, "seeds": {"parameters": 0, "factors": 1}}
    for name in _measure.progress([name for name in options.sizes if name not in kept], "sizes"):
        kept[name] = measured(SIZES[name], chosen, options.rounds)
        rows = {name: kept[name] for name in SIZES if name in kept}
        _measure.save(options.out, given | {"rows": rows})
        print(f"\n## {name}\n\n{report.of_one_size(kept[name])}\n\n{report.missed(kept[name])}", flush=True)
    if is_of_pages:
        pages.main()


if __name__ == "__main__":
    main()
