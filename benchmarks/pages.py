"""Writes the tables and the sentences of pages that are computed from result files.

    python -m benchmarks.pages

A page has the comment `<!-- table: NAME -->` above a table and `<!-- end of the table -->` below it. A test fails if a
page and its result file differ.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    _device_table,
    _latency_report,
    _measure,
    _plan_report,
    _plan_tables,
    _ranks_report,
    _result_tables,
    _scaling_report,
    _sentences,
    _site,
    _subspaces_report,
    _training_tables,
    features,
    features_peft,
    merging,
    methods,
    names,
)
from benchmarks._peers import report

ROOT = Path(__file__).parents[1]
METHODS_PAGES = ROOT / "jlora" / "methods"
IO_PAGES = ROOT / "jlora" / "io"
PAGE = Path(__file__).parent / "README.md"
MANY_PAGE = Path(__file__).parent / "many.md"
TPU_PAGE = Path(__file__).parent / "tpus.md"
GPU_PAGE = Path(__file__).parent / "gpus.md"
PEERS_PAGE = Path(__file__).parent / "peers.md"
STEPS_PAGE = Path(__file__).parent / "peers_steps.md"
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
    sites = results[methods.SITE]["methods"]
    header = [
        "benchmark's name",
        "method",
        "form",
        *(part for form in FORMS.values() for part in (f"{form}: FLOPs", "bytes")),
        *(f"site of {width}" for width in _site.WIDTHS),
    ]
    rows = []
    for name, row in results["transformer"]["methods"].items():
        figures = [results[form]["methods"][name][key] for form in FORMS for key in ("flops", "temp_bytes")]
        figures += [sites.get(f"{name}, {width}", {}).get("activations") for width in _site.WIDTHS]
        form = "dense" if row["dense"] else "factored"
        rows.append([name, f"`{methods.METHODS[name][0]}`", form, *map(_measure.number, figures)])
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
    "steps": (STEPS_PAGE, report.table),
    "limits of steps": (STEPS_PAGE, report.all_missed),
    "seconds of steps": (STEPS_PAGE, functools.partial(report.by_size, "of_by_hand", 1.0, 2)),
    "GFLOPs of steps": (STEPS_PAGE, functools.partial(report.by_size, "flops", 1e9, 2)),
    "temporaries of steps": (STEPS_PAGE, functools.partial(report.by_size, "temp_bytes", 1e6, 1)),
    "compile seconds of steps": (STEPS_PAGE, functools.partial(report.by_size, "compile_seconds", 1.0, 1)),
    "memory of steps": (STEPS_PAGE, functools.partial(report.by_size, "peak_bytes", 1e6, 0)),
    "libraries": (PEERS_PAGE, features.versions),
    "outcomes": (PEERS_PAGE, features.counts),
    "kinds of weight": (PEERS_PAGE, functools.partial(features.table, "weights")),
    "kinds of program": (PEERS_PAGE, functools.partial(features.table, "programs")),
    "latency": (PAPER_PAGE, _latency_report.times_table),
    "costs of latency": (PAPER_PAGE, _latency_report.costs_table),
    "subspaces": (PAPER_PAGE, _subspaces_report.similarity_table),
    "amplification": (PAPER_PAGE, _subspaces_report.amplification_table),
    "ranks and targets": (PAPER_PAGE, _ranks_report.table),
    "in the bank and alone": (PAPER_PAGE, _ranks_report.alone_table),
    "slopes": (PAPER_PAGE, _scaling_report.slope_table),
    "deep models": (PAPER_PAGE, _scaling_report.tower_table),
    "merging": (IO_PAGES / "README.md", lambda: merging.table(_result_tables.result("merging")["rows"])),
    "smallest numbers of GPUs": (GPU_PAGE, plans(_plan_report.gpu_table)),
    "programs for GPUs": (GPU_PAGE, plans(_plan_report.kernel_table)),
    "real cards": (GPU_PAGE, _device_table.table),
    "adapters at once on real cards": (GPU_PAGE, _device_table.bank_table),
    "methods on real cards": (GPU_PAGE, _device_table.methods_table),
    "numbers of devices": (ROOT / "README.md", plans(_plan_tables.devices_table)),
    "smallest slices": (TPU_PAGE, plans(_plan_tables.chips_table)),
    "other steps": (TPU_PAGE, plans(_plan_tables.others_table)),
    "GPT-3": (TPU_PAGE, plans(_plan_tables.gpt3_table)),
    "result files": (PAGE, _result_tables.files),
    "training step": (PAGE, _result_tables.steps),
    "compiled steps": (PAGE, _result_tables.compiled_steps),
    "quality": (PAGE, _result_tables.quality),
    "reviews": (PAGE, _training_tables.reviews),
    "reviews, quantised": (PAGE, _training_tables.reviews_bases),
    "language model": (PAGE, _training_tables.perplexity),
    "names": (IO_PAGES / "peft" / "README.md", names.table),
    "loading": (PAGE, _result_tables.loading),
    "experts": (PAGE, _result_tables.experts),
    "quantised base": (PAGE, _result_tables.quantised),
    "many adapters": (MANY_PAGE, _result_tables.many),
    "many adapters, times": (MANY_PAGE, _result_tables.many_times),
    "server": (MANY_PAGE, _result_tables.server),
    "genres": (MANY_PAGE, _result_tables.genres),
    "rates": (MANY_PAGE, _result_tables.rates),
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


def generated() -> dict[Path, str]:
    """Every page that has generated tables or sentences, with the present ones."""
    out: dict[Path, str] = {}
    for name, (page, make) in TABLES.items():
        out[page] = with_table(out.get(page) or page.read_text(), name, make())
    for sentence in _sentences.SENTENCES:
        page = ROOT / sentence.page
        out[page] = _sentences.with_sentence(out.get(page) or page.read_text(), sentence)
    return out


def main() -> None:
    """Writes all tables and sentences, and the picture of the comparison of steps."""
    for page, text in generated().items():
        page.write_text(text)
    report.draw(report.RESULT)


if __name__ == "__main__":
    main()
