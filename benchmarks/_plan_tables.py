"""Tables of plans for pages: the smallest slices and numbers of cards, and single steps."""

import math
from typing import Any

from benchmarks import _measure
from benchmarks._plan_report import Plans, Results, gib
from benchmarks._plan_rows import CARDS, SMALLEST, SMALLEST_GPUS, slice_name

_TPUS = ("v5e", "v6e", "v5p")


def _of(results: Results, key: tuple[str, str], device: str) -> dict[str, Any] | None:
    """jlora's plan on the smallest number of a device."""
    _, shape = (SMALLEST_GPUS if device in CARDS else SMALLEST)[key][device]
    return results.get(slice_name(*key, f"{device}:{shape}"), {}).get("jlora")


def devices_table(results: Results) -> str:
    """How many cards or chips hold each model. Devices with equal numbers share a row.

    One card need not be compiled, if a smaller one holds the model.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for device in (*CARDS, *_TPUS):
        shapes = {key: (SMALLEST_GPUS if device in CARDS else SMALLEST)[key][device][1] for key in SMALLEST}
        if all(shape == "1" or _of(results, key, device) for key, shape in shapes.items()):
            counts = tuple(str(math.prod(map(int, shape.split("x")))) for shape in shapes.values())
            rows.setdefault(counts, []).append(device)
    header = [f"{model.removeprefix('Llama 3 ')}, {base}" for model, base in SMALLEST]
    return _measure.table(["devices", *header], [[", ".join(names), *counts] for counts, names in rows.items()])


def chips_table(results: Results) -> str:
    """The smallest slice of each generation of TPUs: arguments + temporaries, GiB a chip."""
    memory = [gib(next(p["jlora"]["hbm"] for n, p in results.items() if f" {name}:" in n)) for name in _TPUS]
    body = []
    for (model, base), slices in SMALLEST.items():
        cells = []
        for name in _TPUS:
            plan = _of(results, (model, base), name)
            figures = f": {gib(plan['argument_bytes'])} + {gib(plan['temporary_bytes'])}" if plan else ""
            cells.append(slices[name][1] + figures)
        body.append([f"{model}, {base}", *cells])
    header = [f"{name}, {size} GiB" for name, size in zip(_TPUS, memory, strict=True)]
    return _measure.table(["model, base", *header], body)


# Rows of other steps: what the table calls them, the row of the results, the form.
_OTHERS = (
    ("Llama 3 70B, bf16, v5e:16x16, 32 x 4096 tokens", "70B v5e:16x16", "jlora"),
    ("the same, merged in the step", "70B v5e:16x16", "merged"),
    ("Llama 3 70B, NF4, v5e:4x4, 16 x 2048 tokens", "70B nf4 v5e:4x4", "jlora"),
    ("Llama 3 405B, bf16, v5p:8x8x8, 64 x 4096 tokens", "405B v5p:8x8x8", "jlora"),
    ("8 layers of Llama 3 8B, bf16, one v5e, 4 x 2048 tokens", "block", "jlora"),
    ("the same, merged in the step", "block", "merged"),
)


def others_table(results: Results) -> str:
    """Larger topologies and a part of a model, GiB a chip."""
    keys = ("argument_bytes", "temporary_bytes", "needed", "hbm")
    body = [[label, *(gib(results[name][form][key]) for key in keys)] for label, name, form in _OTHERS]
    return _measure.table(["other steps", "arguments", "temporaries", "all", "of"], body)


def gpt3_table(results: Results) -> str:
    """GPT-3 175B, GB of all chips together."""
    plans: Plans = results["GPT-3 v5p:4x4x4"]
    keys = ("argument_bytes", "temporary_bytes", "needed")
    body = [
        [label, *(f"{plans[form][key] * plans[form]['devices'] / 1e9:,.0f}" for key in keys)]
        for label, form in (("LoRA", "jlora"), ("full fine-tuning", "full"))
    ]
    return _measure.table(["step", "parameters, adapter, Adam", "temporaries", "all"], body)
