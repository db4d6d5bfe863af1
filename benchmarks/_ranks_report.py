"""The tables of `ranks`, from its result file."""

import json
import statistics

from benchmarks import _measure

RESULT = _measure.RESULTS / "ranks.json"


def table() -> str:
    """Accuracies by targets and rank."""
    result = json.loads(RESULT.read_text())
    ranks = list(dict.fromkeys(row["rank"] for row in result["runs"]))
    lines = []
    for targets in dict.fromkeys(row["targets"] for row in result["runs"]):
        rows = [row for row in result["runs"] if row["targets"] == targets]
        cells = []
        for rank in ranks:
            percent = [100 * row["accuracy"] for row in rows if row["rank"] == rank]
            cells.append(f"{statistics.mean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})")
        smallest = min(rows, key=lambda row: row["rank"])
        lines.append([targets, f"{smallest['parameters'] // smallest['rank']:,}", *cells])
    return _measure.table(["adapted", "numbers for rank 1", *(f"r = {rank}" for rank in ranks)], lines)


def alone_table() -> str:
    """The run that was trained in the bank and by itself."""
    row = json.loads(RESULT.read_text())["alone"]
    cells = [f"{row['targets']}, r = {row['rank']}, seed {row['seed']}"]
    cells += [f"{100 * row[key]:.2f}%" for key in ("in the bank", "accuracy")]
    header = ["run", "member of a bank", "alone", "largest difference of logits"]
    return _measure.table(header, [[*cells, f"{row['difference of logits']:.1e}"]])
