"""What every LoRA library for JAX makes of each kind of weight and of program, and the table of it.

    python -m benchmarks.features                    # makes an environment for each library, and tries all
    python -m benchmarks.features --only qwix Keras  # the others keep their results
    python -m benchmarks.pages                       # writes the table again

The kinds are those of the catalogue on which jlora's law is tested. `_peers/tries.py` says what an outcome means.
"""

import argparse
import collections
import concurrent.futures
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _measure
from benchmarks._peers import environments
from benchmarks._peers.environments import JLORA, PEERS, Peer

RESULT = _measure.RESULTS / "features.json"
OUTCOMES = ("correct", "wrong", "refused", "silently skipped")
SECTIONS = {"weights": "kind of weight", "programs": "kind of program"}


def outcomes(peer: Peer, kinds: list[str]) -> dict[str, Any]:
    """What one library makes of all cases, or of these, or why it could not be installed or imported."""
    try:
        interpreter = environments.python(peer)
    except environments.NotInstalledError as error:
        return {"absent": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [interpreter, "-m", f"benchmarks._peers.{peer.module}", str(out), *kinds]
        done = subprocess.run(command, capture_output=True, text=True, env=environments.variables())
        if done.returncode:
            return {"absent": done.stderr.strip().splitlines()[-1]}
        return json.loads(out.read_text())


def results() -> dict[str, Any]:
    """The saved results."""
    return json.loads(RESULT.read_text())


def libraries(saved: dict[str, Any]) -> dict[str, Any]:
    """The results of the libraries that ran."""
    return {name: row for name, row in saved["libraries"].items() if "absent" not in row}


def counts() -> str:
    """How often each library has each outcome."""
    rows = []
    for name, library in libraries(results()).items():
        for section, title in SECTIONS.items():
            number = collections.Counter(row["outcome"] for row in library[section].values())
            cells = [number[outcome] for outcome in (*OUTCOMES, "")]
            rows.append([f"{name}, {title.split()[-1]}s", *cells])
    return _measure.table(["library", *OUTCOMES, "not run"], rows)


def table(section: str) -> str:
    """The outcome of every kind of a section for every library."""
    columns = libraries(results())
    names = columns[JLORA.name][section]
    rows = [[name, *(library[section][name]["outcome"] or "not run" for library in columns.values())] for name in names]
    return _measure.table([SECTIONS[section], *columns], rows)


def versions() -> str:
    """The versions that were tried, and what could not be."""
    rows = []
    for name, library in results()["libraries"].items():
        versions = library.get("absent") or ", ".join(f"{p} {v}" for p, v in library["versions"].items())
        rows.append([name, versions])
    return _measure.table(["library", "versions"], rows).replace("---:", "---")


def main() -> None:
    """Tries the libraries, saves the outcomes, and writes the page."""
    from benchmarks import pages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = {peer.name: peer for peer in (JLORA, *PEERS)}
    parser.add_argument("--only", nargs="+", choices=peers, help="libraries to try (default: all)")
    parser.add_argument("--kinds", nargs="+", default=[], help="to try again; the others keep their results")
    options = parser.parse_args()
    saved = results()["libraries"] if RESULT.exists() else {}
    tried = [peers[name] for name in options.only or peers]
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        for peer, library in zip(tried, pool.map(lambda p: outcomes(p, options.kinds), tried), strict=True):
            old = saved.get(peer.name, {}) if options.kinds else {}
            saved[peer.name] = library | {key: old.get(key, {}) | library.get(key, {}) for key in SECTIONS}
            rows = [row for section in SECTIONS for row in library.get(section, {}).values()]
            print(peer.name, collections.Counter(row["outcome"] for row in rows), flush=True)
            kept = {name: saved[name] for name in peers if name in saved}
            _measure.save(RESULT, {"environment": environments.machine(), "libraries": kept})
    pages.main()


if __name__ == "__main__":
    main()
