"""The table of a real accelerator, from the files that `benchmarks/device.sh` has written."""

import json
import statistics
from typing import Any

from benchmarks import _measure
from benchmarks._plan_report import gib


def methods_table() -> str:
    """A step of every method on an MLP on each card, in units of LoRA's, and what is left out."""
    body = []
    for result in _results():
        card = result["environment"]["device"]
        for name, row in result["methods"].items():
            milliseconds = [1000 * s for s in row["seconds"]]
            spread = f"{min(milliseconds):.2f} to {max(milliseconds):.2f}"
            ratio = _measure.number(row["of LoRA"])
            body.append([f"{card}: {name}", f"{1000 * row['median']:.2f} ({spread})", ratio])
        body += [[f"{card}: {name}", f"left out: {why}", ""] for name, why in result.get("left out", {}).items()]
    return _measure.table(["method", "ms (lowest to highest)", "/ LoRA"], body)


def bank_table() -> str:
    """Several adapters at once on each card, each on a batch of its own, and one adapter on all of their batches."""
    body = []
    for result in _results():
        card, rows = result["environment"]["device"], result["bank"]
        for name, row in rows.items():
            count = name.split()[0]
            one = rows.get(f"one adapter, {count} batches")
            if one:
                seconds = {"many": row["seconds"], "one": one["seconds"]}
                times = [f"{1000 * r['median']:.2f}" for r in (row, one)]
                body.append([f"{card}: {name}", *times, f"{_measure.ratio(seconds, 'many', 'one'):.3f}"])
    return _measure.table(["adapters", "ms", "one adapter on all batches, ms", "ratio"], body)


def _results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(_measure.RESULTS.glob("device-*.json"))]


def table() -> str:
    """Each step on each card: planned and measured peak memory, and times in turns."""
    body = []
    for result in _results():
        card, version = result["environment"]["device"], result["environment"]["jax"]
        for base, steps in result["steps"].items():
            seconds = {form: step["seconds"] for form, step in steps.items()}
            for form in steps:
                memory = result["memory"][base][form]
                planned = memory["plan"].get("needed")
                times = seconds[form]
                body.append(
                    [
                        f"{card}, JAX {version}: {base}, {form}",
                        f"{gib(planned)} / {gib(memory['peak'])}" if planned else f" / {gib(memory['peak'])}",
                        f"{statistics.median(times):.4f} ({min(times):.4f} to {max(times):.4f})",
                        *(
                            f"{_measure.ratio(seconds, form, other):.3f}" if other in seconds else ""
                            for other in ("by hand", "full")
                        ),
                    ]
                )
    header = ["step", "plan / peak, GiB", "seconds (lowest to highest)", "/ by hand", "/ full fine-tuning"]
    return _measure.table(header, body)
