"""Writes the tables of pages that are computed from result files.

    python -m benchmarks.pages

A page has the comment `<!-- table: NAME -->` above a table and `<!-- end of the table -->` below it. A test fails if a
page and its result file differ.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    _measure,
    _plan_report,
    _subspaces_report,
    features,
    features_peft,
    methods,
    peers,
)

METHODS_PAGES = Path(__file__).parents[1] / "jlora" / "methods"
GPU_PAGE = Path(__file__).parent / "gpus.md"
PEERS_PAGE = Path(__file__).parent / "peers.md"
PAPER_PAGE = Path(__file__).parent / "paper.md"
END = "<!-- end of the table -->"

FORMS = {
    "transformer": "transformer",
    "transformer_biased": "with biases",
    "kernel": "kernel",
    "kernel_biased": "with a bias",
}


def costs() -> str:
    """FLOPs, temporary bytes and time of every method, in units of LoRA's."""
    results = json.loads((_measure.RESULTS / "methods.json").read_text())
    forms = [form for form in FORMS if form in results]
    header = [
        "benchmark's name",
        "method",
        "form",
        *(part for form in forms for part in (f"{FORMS[form]}: FLOPs", "bytes")),
    ]
    rows = []
    for name, row in results["transformer"]["methods"].items():
        figures = [
            _measure.number(results[form]["methods"][name][key]) for form in forms for key in ("flops", "temp_bytes")
        ]
        rows.append([name, f"`{methods.METHODS[name][0]}`", "dense" if row["dense"] else "factored", *figures])
    return _measure.table(header, rows)


def plans(table: Callable[[_plan_report.Results], str]) -> Callable[[], str]:
    """A table of the plans."""
    return lambda: table(json.loads((_measure.RESULTS / "plan.json").read_text()))


# PEFT's own figures of the time of a training step on an L40S, in units of its LoRA's.
PUBLISHED = {
    "DoRA": 1.26,
    "LoHa": 1.48,
    "LoKr": 1.37,
    "HiRA": 1.37,
    "OFT": 1.26,
    "LoRA-FA": 1.23,
    "BOFT": 7.35,
    "RandLoRA": 1.51,
    "C3A": 1.24,
    "GraLoRA": 1.16,
}


def beside_peft() -> str:
    """The time of a step of every method that both libraries have, each in units of its own LoRA's."""
    ours = json.loads((_measure.RESULTS / "methods.json").read_text())["transformer"]["methods"]
    file = _measure.RESULTS / "peft_costs.json"
    theirs = json.loads(file.read_text())["methods"] if file.exists() else {}
    rows = []
    for name in dict.fromkeys([*PUBLISHED, *theirs]):
        here = [_measure.number(rows_of.get(name, {}).get("of_lora"), 2) for rows_of in (ours, theirs)]
        rows.append([name, *here, _measure.number(PUBLISHED.get(name), 2)])
    return _measure.table(["method", "jlora", "PEFT, here", "PEFT, published"], rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "costs": (METHODS_PAGES / "costs.md", costs),
    "beside PEFT": (METHODS_PAGES / "costs.md", beside_peft),
    "features": (METHODS_PAGES / "scope.md", features_peft.table),
    "steps": (PEERS_PAGE, peers.table),
    "libraries": (PEERS_PAGE, features.versions),
    "outcomes": (PEERS_PAGE, features.counts),
    "kinds of weight": (PEERS_PAGE, functools.partial(features.table, "weights")),
    "kinds of program": (PEERS_PAGE, functools.partial(features.table, "programs")),
    "subspaces": (PAPER_PAGE, _subspaces_report.similarity_table),
    "amplification": (PAPER_PAGE, _subspaces_report.amplification_table),
    "smallest numbers of GPUs": (GPU_PAGE, plans(_plan_report.gpu_table)),
    "programs for GPUs": (GPU_PAGE, plans(_plan_report.kernel_table)),
}


def with_table(text: str, name: str, table: str) -> str:
    """The text of a page with another table of a name.

    Raises:
        ValueError: if the page has no comments around such a table.
    """
    before, start, rest = text.partition(f"<!-- table: {name} -->\n")
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"The page has no table {name!r} between `<!-- table: {name} -->` and `{END}`.")
    return before + start + f"\n{table}\n\n" + end + after


def main() -> None:
    """Writes all tables."""
    for name, (page, make) in TABLES.items():
        page.write_text(with_table(page.read_text(), name, make()))


if __name__ == "__main__":
    main()
