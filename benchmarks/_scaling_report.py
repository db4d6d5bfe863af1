"""The slopes of `scaling`, its tables and its picture."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from benchmarks import _measure

matplotlib.use("agg")
from matplotlib import pyplot, ticker

RESULT = _measure.RESULTS / "scaling.json"
PROGRAMS = ("jlora", "by hand", "full fine-tuning")
MEASURES = {
    "flops": "FLOPs",
    "temp_bytes": "temporary bytes",
    "seconds": "seconds a step",
    "lower_seconds": "tracing and lowering",
    "equations": "equations",
}


def slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The exponent of a power law that fits the values, and its standard error."""
    (exponent, _), covariance = np.polyfit(np.log(sizes), np.log(values), 1, cov=True)
    return float(exponent), float(np.sqrt(max(covariance[0, 0], 0.0)))


def slopes(axes: Mapping[str, Any]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """The slope of every measure along every axis: {axis: {measure: {program: (slope, standard error)}}}."""
    out: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for axis, points in axes.items():
        sizes = [int(size) for size in points]
        for measure in MEASURES:
            for name in PROGRAMS if axis not in ("rank", "sites") else PROGRAMS[:2]:
                values = [points[str(size)][name].get(measure) for size in sizes]
                if len(sizes) > 2 and all(values):
                    out.setdefault(axis, {}).setdefault(measure, {})[name] = slope(sizes, values)
    return out


def slope_table() -> str:
    """The slopes of jlora and of the two others, by axis and measure."""
    fitted, rows = slopes(json.loads(RESULT.read_text())["axes"]), []
    for axis, measures in fitted.items():
        for measure, programs in measures.items():
            cells = ["{:.2f} ± {:.2f}".format(*programs[name]) if name in programs else "" for name in PROGRAMS]
            rows.append([axis, MEASURES[measure], *cells])
    return _measure.table(["with", "grows", *PROGRAMS], rows)


def tower_table() -> str:
    """Tracing and lowering the gradients of deep models."""
    result = json.loads(RESULT.read_text())
    rows = []
    for form, row in result["towers"].items():
        seconds = [f"{statistics.median(row['seconds'][name]):.2f}" for name in PROGRAMS]
        rows.append([f"{result['options']['layers']} x `{form}`", *seconds, f"{row['of the base']:.2f}"])
    return _measure.table(["layers", "jlora, s", "by hand, s", "all weights, s", "jlora / all weights"], rows)


def draw(result: Mapping[str, Any]) -> None:
    """Small multiples: a row for each measure, a column for each axis, all axes logarithmic."""
    axes, fitted = result["axes"], slopes(result["axes"])
    measures = [m for m in MEASURES if any(m in fitted[axis] for axis in fitted)]
    figure, grid = pyplot.subplots(
        len(measures),
        len(fitted),
        figsize=(2.2 * len(fitted), 1.7 * len(measures)),
        layout="constrained",
        squeeze=False,
    )
    for column, (axis, by_measure) in zip(grid.T, fitted.items(), strict=True):
        for cell, measure in zip(column, measures, strict=True):
            for name in by_measure.get(measure, {}):
                values = [row[name][measure] for row in axes[axis].values()]
                exponent = by_measure[measure][name][0]
                cell.loglog([int(n) for n in axes[axis]], values, "o-", label=f"{name}: {exponent:.2f}", markersize=3)
            cell.legend(fontsize=5)
            cell.tick_params(labelsize=6, which="both")
            cell.xaxis.set_minor_locator(ticker.NullLocator())
            cell.set_xticks([int(n) for n in axes[axis]], list(axes[axis]))
            if cell.get_ylim()[1] < 10 * cell.get_ylim()[0]:  # no power of ten: label the values between
                cell.yaxis.set_minor_locator(ticker.LogLocator(subs=(1, 2, 5)))
        column[0].set_title(axis, fontsize=8)
    for cell, measure in zip(grid[:, 0], measures, strict=True):
        cell.set_ylabel(MEASURES[measure], fontsize=7)
    figure.savefig(RESULT.with_suffix(".png"), dpi=130)
