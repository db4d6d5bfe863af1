"""Latency of inference: the base, LoRA merged and not merged, and adapter layers.

    PYTHONPATH=examples python -m benchmarks.latency            # two cores, about fifteen minutes
    PYTHONPATH=examples python -m benchmarks.latency --quick    # small models, no times; fails if merging is not free

Table 1 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685) for two models with random weights of their true sizes:
MiniLM-L6, an encoder, and one step of SmolLM2-135M with a cache of keys and values. LoRA adapts the query and value
kernels; `_adapter_layers.py` has the adapter layers. All forms run in turns, and a percentage is the median over rounds
of the ratios of one round.
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax

import jlora
from benchmarks import _latency_models, _measure
from benchmarks._latency_models import BASE, MERGED, RANK, UNMERGED, Form, Model
from benchmarks._measure import Bar

Cell = tuple[int, int]  # batch; tokens of a sequence, or positions of a cache
CELLS: dict[str, list[Cell]] = {
    "encoder": list(itertools.product((1, 16, 32), (64, 128, 256))),
    "decoder": list(itertools.product((1, 16, 32), (128, 512))),
}
QUICK: list[Cell] = [(2, 8)]


def jitted(model: Model, form: Form) -> Any:
    """The function of a form under `jax.jit`, its inputs donated if they are a cache."""
    first = len(form.params)
    return jax.jit(form.function, donate_argnums=(first, first + 1) if model.donated else ())


def compile_cell(model: Model, batch: int, length: int) -> dict[str, jax.stages.Compiled]:
    """Every form, compiled for one batch and length."""
    inputs = model.inputs(batch, length)
    return {name: jitted(model, form).lower(*form.params, *inputs).compile() for name, form in model.forms.items()}


def time_cell(
    model: Model, programs: Mapping[str, jax.stages.Compiled], batch: int, length: int, rounds: int
) -> dict[str, Any]:
    """Times and ratios to the base of every form in one cell."""
    held = {"inputs": model.inputs(batch, length)}

    def call(name: str) -> Any:
        out = programs[name](*model.forms[name].params, *held["inputs"])
        if model.donated:
            held["inputs"] = out
        return out

    calls = {name: functools.partial(call, name) for name in programs}
    seconds = _measure.interleave(calls, rounds)
    rows = {}
    for name, times in seconds.items():
        over = [100 * (time / base - 1) for time, base in zip(times, seconds[BASE], strict=True)]
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times),
            "rounds": [round(1e3 * time, 3) for time in times],
            "percent over base": statistics.quantiles(over, n=4),
        }
    return rows


def costs(model: Model, batch: int, length: int) -> dict[str, Any]:
    """What the compiler says of every form in one cell, over all iterations of the loops over layers."""
    inputs = model.inputs(batch, length)
    rows = {}
    for name, form in model.forms.items():
        plan = jlora.plan(jitted(model, form), *form.params, *inputs, topology="cpu:1")
        rows[name] = {"added": form.added, "flops": plan.flops, "temp_bytes": plan.temporary_bytes}
    return rows


def different_lines(programs: Mapping[str, jax.stages.Compiled], name: str) -> int:
    """How many lines of a form's compiled text differ from the base's."""
    lines = [(programs[form].as_text() or "").splitlines() for form in (name, BASE)]
    return sum(a != b for a, b in itertools.zip_longest(*lines))


def bars(model: Model, cell: Cell, rows: Mapping[str, Any], different: int) -> list[Bar]:
    """Merging costs nothing, and LoRA beside the weights its own products alone."""
    tokens = cell[0] * (1 if model.donated else cell[1])
    base, beside = rows[BASE], rows[UNMERGED]
    products = (beside["flops"] - base["flops"]) / (2 * tokens * beside["added"])
    return [
        Bar(f"{model.name}: lines of the merged program that differ", different, 0),
        Bar(f"{model.name}: not merged, added FLOPs / 2 tokens rank (in + out)", products, 1.0),
        Bar(f"{model.name}: not merged, temporary bytes / base", beside["temp_bytes"] / base["temp_bytes"], 1.15),
    ]


def measure(model: Model, cells: Sequence[Cell], rounds: int) -> tuple[dict[str, Any], list[Bar]]:
    """All cells of a model; the compiler's costs are of the last."""
    result: dict[str, Any] = {"cell of the costs": cells[-1], "costs": costs(model, *cells[-1]), "cells": {}}
    different = 0
    for batch, length in cells:
        programs = compile_cell(model, batch, length)
        lines = {name: different_lines(programs, name) for name in programs}
        different += lines[MERGED]
        cell: dict[str, Any] = {"batch": batch, "length": length, "different lines": lines}
        if rounds:  # a short program needs more rounds
            cell["times"] = time_cell(model, programs, batch, length, rounds if batch > 1 else 4 * rounds)
        result["cells"][f"{batch} x {length}"] = cell
    return result, bars(model, cells[-1], result["costs"], different)


def main() -> None:
    """Measures both models, prints, and saves."""
    parser = _measure.parser(__doc__, "latency.json")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, 4 times as many at batch 1 (default: 7)")
    parser.add_argument("--quick", action="store_true", help="small models, no times")
    options = parser.parse_args()
    rounds = 0 if options.quick else options.rounds
    result: dict[str, Any] = {"environment": _measure.environment(), "rank": RANK, "rounds": rounds, "models": {}}
    verdicts: list[Bar] = []
    for name, cells in CELLS.items():
        model = (_latency_models.SMALL if options.quick else _latency_models.FULL)[name]()
        if options.quick:
            model = replace(model, forms={name: model.forms[name] for name in (BASE, MERGED, UNMERGED)})
        rows, limits = measure(model, QUICK if options.quick else cells, rounds)
        result["models"][model.name] = rows
        verdicts += limits
        if rounds:
            result["bars"] = [asdict(bar) | {"passed": bar.passed} for bar in verdicts]
            _measure.save(options.out, result)
    print(_measure.verdicts(verdicts))
    if options.quick and not all(bar.passed for bar in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
