"""The table of a real accelerator, from the files that `benchmarks/device.sh` has written."""

import json
import statistics

from benchmarks import _measure
from benchmarks._plan_report import gib


def table() -> str:
    """Each step on each card: planned and measured peak memory, and times in turns."""
    body = []
    for file in sorted(_measure.RESULTS.glob("device-*.json")):
        result = json.loads(file.read_text())
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
