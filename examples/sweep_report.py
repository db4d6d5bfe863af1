"""The report of sweep.py: good learning rates and the lowest loss of every curve, as a table, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from report import COLOURS, STYLE, plt

TOLERANCE = 0.015  # nats: differences below it are within the spread of seeds

# One run as sweep.py records it: settings, losses and accuracy.
Record = Mapping[str, Any]
# The runs at every learning rate, in ascending order, with one record for each seed.
Curve = dict[float, list[Record]]


class Cell(NamedTuple):
    """What all runs of a curve share; rank None is full fine-tuning."""

    rank: int | None
    layers: str
    batch: int

    def __str__(self) -> str:
        return "full fine-tuning" if self.rank is None else f"rank {self.rank}"


def curves(runs: Sequence[Record]) -> dict[Cell, Curve]:
    """The runs by cell and learning rate; small batches first, and full fine-tuning before rank 1."""
    cells: dict[Cell, Curve] = {}
    for run in sorted(runs, key=lambda run: (run["batch"], run["layers"] != "all", run["rank"] or 0, run["rate"])):
        curve = cells.setdefault(Cell(run["rank"], run["layers"], run["batch"]), {})
        curve.setdefault(run["rate"], []).append(run)
    return cells


def good_rates(curve: Curve) -> list[float]:
    """The rates whose mean loss is within `TOLERANCE` of the lowest."""
    lowest = min(map(mean, curve.values()))
    return [rate for rate, runs in curve.items() if mean(runs) <= lowest + TOLERANCE]


def mean(runs: Sequence[Record], key: str = "loss") -> float:
    """The mean over seeds."""
    return statistics.mean(run[key] for run in runs)


def at_best(curve: Curve) -> list[Record]:
    """The runs of all seeds at the rate whose mean loss is lowest."""
    return min(curve.values(), key=mean)


def table(runs: Sequence[Record]) -> str:
    """A Markdown table: one row for each cell, compared with full fine-tuning at the same batch size.

    Losses are those at the best rate. "of full's" divides the middles of the good rates. "over full's" is the mean
    difference of the seeds, with the lowest and the highest.
    """
    header = ["trained", "layers", "batch", "numbers", "good rates", "of full's", "loss", "over full's", "accuracy"]
    lines = [header, ["---"] * 2 + ["--:"] * 7]
    cells = curves(runs)
    for cell, curve in cells.items():
        best, full = at_best(curve), Cell(None, "all", cell.batch)
        rates = good_rates(curve)
        good = f"{rates[0]:.0e} to {rates[-1]:.0e}" if len(rates) > 1 else f"{rates[0]:.0e}"
        ratio = over = ""
        if cell != full and full in cells:
            ratio = f"{statistics.geometric_mean(rates) / statistics.geometric_mean(good_rates(cells[full])):.1f}"
            baseline = {run["seed"]: run["loss"] for run in at_best(cells[full])}
            differences = [run["loss"] - baseline[run["seed"]] for run in best if run["seed"] in baseline]
            over = f"{statistics.mean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
        numbers, loss, accuracy = f"{best[0]['parameters']:,}", f"{mean(best):.3f}", f"{mean(best, 'accuracy'):.1%}"
        lines.append([str(cell), cell.layers, str(cell.batch), numbers, good, ratio, loss, over, accuracy])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(runs: Sequence[Record], frozen: float, path: Path) -> None:
    """Draws the loss against the rate for ranks and for kinds of layers, and the lowest loss against the batch size."""
    cells = curves(runs)
    small = min(cell.batch for cell in cells)
    numbers = {cell: at_best(curve)[0]["parameters"] for cell, curve in cells.items()}
    equal = {numbers[cell] for cell in cells if cell.layers != "all"}
    ranks = sorted({cell.rank for cell in cells if cell.rank and cell.layers == "all"})
    colours: dict[int | None, Any] = {None: COLOURS["full"]}
    colours |= dict(zip(ranks, plt.colormaps["viridis"](np.linspace(0.1, 0.85, len(ranks))), strict=True))
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(12.5, 4), dpi=150, layout="constrained", sharey=True
        )
        for axes in (left, middle, right):
            axes.set_xscale("log")
        for cell, curve in cells.items():
            if cell.batch == small and cell.layers == "all":
                band(left, curve, str(cell), colours[cell.rank])
            if cell.batch == small and numbers[cell] in equal:
                band(middle, curve, f"{cell.layers}, {cell}")
        for rank, colour in colours.items():
            best = {cell.batch: at_best(curve) for cell, curve in cells.items() if cell[:2] == (rank, "all")}
            if len(best) > 1:
                band(right, best, str(Cell(rank, "all", small)), colour)
                right.set_xticks(list(best), map(str, best), minor=False)
                right.set_xticks([], minor=True)
        for axes in (left, middle, right):
            axes.axhline(frozen, color=COLOURS["head alone"], linestyle=":", label="frozen encoder")
            axes.legend(fontsize=8, loc="upper left")
        left.set(title="Ranks", xlabel="learning rate", ylabel="held-out loss (nats)", ylim=(None, frozen + 0.12))
        middle.set(title="Kinds of layers, equal parameters", xlabel="learning rate")
        right.set(title="Batch sizes, each at its best rate", xlabel="sentences in a step")
        figure.suptitle("MiniLM-L6 on film reviews: mean, lowest and highest of the seeds", fontweight="bold")
        figure.savefig(path)
        plt.close(figure)


def band(axes: Any, points: Mapping[Any, Sequence[Record]], label: str, colour: Any = None) -> None:
    """The mean loss at each point, with a band from the lowest to the highest seed."""
    losses = [[run["loss"] for run in runs] for runs in points.values()]
    means = list(map(statistics.mean, losses))
    (line,) = axes.plot(list(points), means, "o-", markersize=4, label=label, color=colour)
    axes.fill_between(list(points), list(map(min, losses)), list(map(max, losses)), alpha=0.15, color=line.get_color())


def write(runs: Sequence[Record], frozen: float, path: Path) -> str:
    """Draws the picture at `path`; returns the table."""
    draw(runs, frozen, path)
    return table(runs)
