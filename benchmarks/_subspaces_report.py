"""The tables and the picture of subspaces, from the result file."""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks import _measure

matplotlib.use("agg")
from matplotlib import pyplot

RESULT = _measure.RESULTS / "subspaces.json"
SHOWN = ((1, 1), (4, 4), (8, 8), (8, 64))  # numbers of directions i and j
NORMS = ("weight", "update", "in the update's directions", "in its own directions", "in random directions", "factor")


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the lowest and the highest value."""
    low, mean, high = min(values), statistics.mean(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def by_kernel(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of all layers, in their order, for queries and for values."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for path, rows in result["kernels"].items():
        kernels.setdefault(path.split("/")[-2], []).append(rows)
    return kernels


def pairs(result: dict[str, Any]) -> list[str]:
    """The names of the compared runs."""
    return list(next(iter(result["kernels"].values()))["similarity"])


def similarity_table() -> str:
    """phi of every pair of runs at some numbers of directions: means, lowest and highest of the layers."""
    result = json.loads(RESULT.read_text())
    grid, width = (result["settings"][key] for key in ("grid", "width"))
    rows, kernels = [], by_kernel(result)
    for pair, kernel in itertools.product(pairs(result), kernels):
        layers = [layer["similarity"][pair] for layer in kernels[kernel]]
        cells = [spread([phi[grid.index(i)][grid.index(j)] for phi in layers], 2) for i, j in SHOWN]
        rows.append([pair, kernel, *cells])
    rows.append(["expected of random spans", "", *[f"{max(counts) / width:.2f}" for counts in SHOWN]])
    return _measure.table(["runs", "kernels", *(f"phi({i}, {j})" for i, j in SHOWN)], rows)


def amplification_table() -> str:
    """Norms and factors of every run: means of the layers, and of the factor the lowest and highest, too."""
    result = json.loads(RESULT.read_text())
    rows = []
    for kernel, layers in by_kernel(result).items():
        for run in result["runs"]:
            columns = {key: [layer["amplification"][run][key] for layer in layers] for key in NORMS}
            means = [_measure.number(statistics.mean(columns[key]), 2) for key in NORMS[:-1]]
            rows.append([kernel, run, *means, spread(columns["factor"], 1)])
    return _measure.table(["kernels", "run", *NORMS], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Heat maps of all pairs, of the last layer's kernels."""
    grid = result["settings"]["grid"]
    names = pairs(result)
    figure, axes = pyplot.subplots(2, len(names), figsize=(9, 5.4), layout="constrained", squeeze=False)
    image = None
    for row, (kernel, layers) in zip(axes, by_kernel(result).items(), strict=True):
        for axis, pair in zip(row, names, strict=True):
            phi = np.array(layers[-1]["similarity"][pair])
            image = axis.imshow(phi, vmin=0, vmax=1, aspect="auto", origin="upper")
            for ticks, size in zip((axis.set_yticks, axis.set_xticks), phi.shape, strict=True):
                ticks(range(size), list(map(str, grid[:size])), fontsize=7)
            axis.set_title(f"{kernel}, {pair}", fontsize=9)
    figure.supylabel("directions i of the first run")
    figure.supxlabel("directions j of the second")
    assert image is not None
    figure.colorbar(image, ax=axes, label="phi(i, j)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
