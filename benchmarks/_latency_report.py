"""The tables of latency, from the result file."""

import json
from collections.abc import Sequence

from benchmarks import _measure

RESULT = _measure.RESULTS / "latency.json"
BASE = "base"


def over(quartiles: Sequence[float]) -> str:
    """A percentage with the quartiles of the rounds."""
    low, middle, high = quartiles
    return f"{middle:+.1f}% ({low:+.1f} to {high:+.1f})"


def times_table() -> str:
    """Milliseconds of the base, and what each form adds, for every cell; and how loaded the machine was."""
    result = json.loads(RESULT.read_text())
    rows, models = [], result["models"]
    forms = [form for form in next(iter(models.values()))["costs"] if form != BASE]
    for name, model in models.items():
        for cell in model["cells"].values():
            times = cell["times"]
            added = [over(times[form]["percent over base"]) for form in forms]
            milliseconds = _measure.number(times[BASE]["milliseconds"], 1)
            rows.append([name, cell["batch"], cell["length"], milliseconds, *added])
    table = _measure.table(["model", "batch", "length", "base, ms", *forms], rows)
    cores, load = (result["environment"][key] for key in ("cores", "load"))
    rounds = f"{result['rounds']} rounds, four times as many at batch 1"
    return f"{table}\n\n{rounds}; {cores} cores with a load of {load:.0f}."


def costs_table() -> str:
    """What the compiler says of every form."""
    rows = []
    for name, model in json.loads(RESULT.read_text())["models"].items():
        base = model["costs"][BASE]
        for form, row in model["costs"].items():
            equal = not any(cell["different lines"][form] for cell in model["cells"].values())
            ratios = [_measure.number(row[key] / base[key], 4) for key in ("flops", "temp_bytes")]
            rows.append([name, form, f"{row['added']:,}", *ratios, "yes" if equal else "no"])
    header = ["model", "form", "added numbers", "FLOPs / base", "temporary bytes / base", "the base's program"]
    return _measure.table(header, rows)
