"""The results of `train_many.py` as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import report  # selects the backend of matplotlib
from report import plt
from training import accuracy

WAYS = {
    "frozen encoder": "#6c757d",
    "alone": "#e9a23b",
    "together": "#1f6f8b",
    "mixed batch": "#7b2d8b",
}


def compare(logits: dict[str, np.ndarray], labels: Any) -> dict[str, dict[str, float]]:
    """For every way to compute logits: the accuracy, and how far it agrees with members that were trained together."""
    together = logits["together"]
    return {
        way: {
            "accuracy": accuracy(values, labels),
            "same class": float((values.argmax(-1) == together.argmax(-1)).mean()),
            "difference of logits": float(np.abs(values - together).max()),
        }
        for way, values in logits.items()
    }


def write(folder: Path, result: dict[str, Any]) -> str:
    """Writes `many.png` into `folder`; returns the table as Markdown."""
    draw(folder / "many.png", result)
    return table(result) + f"\n\nWritten to {folder}: results.json, many.png, and the bank of every seed"


def accuracies(result: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """The test accuracies in percent by way and genre, one for each seed; the frozen encoder has one for all."""
    frozen, runs = result["frozen encoder"], list(result["runs"].values())
    percent = {"frozen encoder": {genre: np.array([100 * value]) for genre, value in frozen.items()}}
    for way in ("alone", "together", "mixed batch"):
        rows = {genre: [run["genres"][genre].get(way) for run in runs] for genre in frozen}
        if None not in rows["tweets"]:
            percent[way] = {genre: np.array([100 * row["accuracy"] for row in rows[genre]]) for genre in frozen}
    return percent


def table(result: dict[str, Any]) -> str:
    """Accuracies by genre, means over seeds and (lowest to highest); and how far the ways agree."""
    percent, runs = accuracies(result), list(result["runs"].values())

    def cell(values: np.ndarray) -> str:
        spread = f" ({values.min():.1f} to {values.max():.1f})" if len(values) > 1 else ""
        return f"{values.mean():.1f}%{spread}"

    lines = ["| genre | " + " | ".join(percent) + " |", "| --- |" + " ---: |" * len(percent)]
    for genre in result["frozen encoder"]:
        lines.append(f"| {genre} | " + " | ".join(cell(percent[way][genre]) for way in percent) + " |")
    means = {way: np.mean(list(by_genre.values()), axis=0) for way, by_genre in percent.items()}
    lines.append("| mean | " + " | ".join(map(cell, means.values())) + " |")

    count, mean = result["test texts"], means["together"].mean() / 100
    error = 100 * (mean * (1 - mean) / count) ** 0.5
    lines += ["", f"The standard error of an accuracy on {count} texts is {error:.1f} points."]
    for way in ("alone", "mixed batch"):
        if way in percent:
            rows = [genre[way] for run in runs for genre in run["genres"].values()]
            same = 100 * np.mean([row["same class"] for row in rows])
            largest = max(row["difference of logits"] for row in rows)
            lines.append(f"Together against {way}: {same:.2f}% of the classes are equal, logits within {largest:.1e}.")
    return "\n".join(lines)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the accuracies by genre, and those of every adapter on every genre."""
    percent, genres = accuracies(result), list(result["frozen encoder"])
    pairs = 100 * np.mean([run["pairs"] for run in result["runs"].values()], axis=0)
    with plt.rc_context(report.STYLE):
        figure, (bars, matrix) = plt.subplots(
            1, 2, figsize=(12.5, 4.4), dpi=130, layout="constrained", width_ratios=[1.5, 1]
        )
        seeds = len(result["runs"])
        figure.suptitle(
            f"Four genres, four adapters, one program: MiniLM-L6, {seeds} seed{'s' * (seeds > 1)}", fontweight="bold"
        )
        width = 0.8 / len(percent)
        for k, (way, by_genre) in enumerate(percent.items()):
            x = np.arange(len(genres)) + (k - (len(percent) - 1) / 2) * width
            means = [by_genre[genre].mean() for genre in genres]
            drawn = bars.bar(x, means, 0.92 * width, color=WAYS[way], label=way)
            bars.bar_label(drawn, fmt="%.0f", padding=6, fontsize=8)
            for place, genre in zip(x, genres, strict=True):
                bars.plot([place] * len(by_genre[genre]), by_genre[genre], "o", color="black", markersize=2.5)
        bars.set_xticks(range(len(genres)), genres)
        bars.set(
            title=f"Accuracy on {result['test texts']} test texts (dots: seeds)", ylabel="accuracy (%)", ylim=(50, 106)
        )
        bars.grid(visible=False, axis="x")
        bars.legend(ncols=len(percent), loc="upper center", fontsize=9)

        image = matrix.imshow(pairs, cmap="Blues", vmin=50, vmax=100)
        for row, column in np.ndindex(pairs.shape):
            colour = "white" if pairs[row, column] > 75 else "black"
            weight = "bold" if row == column else "normal"
            matrix.text(column, row, f"{pairs[row, column]:.0f}", ha="center", va="center", color=colour, weight=weight)
        short = [genre.replace(" ", "\n") for genre in genres]
        matrix.set_xticks(range(len(genres)), short)
        matrix.set_yticks(range(len(genres)), short)
        matrix.set(title="The adapter of one genre on texts of another (%)", xlabel="texts", ylabel="adapter")
        matrix.grid(visible=False)
        matrix.spines[:].set_visible(False)
        figure.colorbar(image, ax=matrix, shrink=0.85)
        figure.savefig(path)
        plt.close(figure)
