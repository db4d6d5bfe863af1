"""The results of `train_experts.py` as tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import report  # selects the backend of matplotlib
from report import plt

LABELS = {"lora": "LoRA", "dora": "DoRA", "shared": "LoRA, outer factors shared"}
COLOURS = {"lora": "#1f6f8b", "dora": "#e9a23b", "shared": "#7b2d8b"}


def write(folder: Path, result: dict[str, Any]) -> str:
    """Writes `experts.png` into `folder`; returns the tables as Markdown."""
    draw(folder / "experts.png", result)
    tables = "\n\n".join([table(result), files(result), experts(result)])
    return f"{tables}\n\nWritten to {folder}: results.json, experts.png, and the adapter of every method in its layouts"


def table(result: dict[str, Any]) -> str:
    """The methods: accuracies, sizes and costs, and whether each expert moves as its tokens say."""
    base = result["base"]
    lines = [
        "| adapted by | accuracy | trained numbers | bytes of the adapter | added FLOPs | moved / had tokens "
        "| merged | other dispatch |",
        "| --- |" + " ---: |" * 7,
        f"| (the base alone) | {base['accuracy']:.1%} | {base['numbers']:,} | | | | | |",
    ]
    for method, row in result["methods"].items():
        moved, tokens = np.array(row["moved"]) > 1e-6, np.array(row["tokens"]) > 0
        lines.append(
            f"| {LABELS[method]} | {row['accuracy']:.1%} | {row['trained numbers']:,} | {row['bytes']:,} "
            f"| {row['added FLOPs']:.1%} | {moved.sum()} / {tokens.sum()} of {moved.size} "
            f"| {row['merged']:.1e} | {row['other dispatch']:.1e} |"
        )
    return "\n".join(lines)


def files(result: dict[str, Any]) -> str:
    """What each layout of the files holds, and how far the loaded adapter is from the saved one."""
    lines = [
        "| adapted by | layout | tensors | bytes | written in another form | loaded |",
        "| --- | --- |" + " ---: |" * 4,
    ]
    for method, row in result["methods"].items():
        for layout, file in row["files"].items():
            cells = (
                "refused | | | "
                if "refused" in file
                else f"{file['tensors']} | {file['bytes']:,} | {file['changes']} | {file['loaded']:.1g}"
            )
            lines.append(f"| {LABELS[method]} | {layout} | {cells} |")
    return "\n".join(lines)


def experts(result: dict[str, Any]) -> str:
    """For every expert of every layer: the tokens of the training texts, and how far each method moved it."""
    methods = result["methods"]
    head = [f"{LABELS[method]}: tokens | moved" for method in methods]
    lines = [
        "| layer, expert | tokens before | " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (1 + 2 * len(methods)),
    ]
    for (layer, expert), before in np.ndenumerate(np.array(result["base"]["tokens"])):
        cells = [f"{row['tokens'][layer][expert]:,} | {row['moved'][layer][expert]:.2%}" for row in methods.values()]
        lines.append(f"| {layer}, {expert} | {before:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the loss of every method, and how far every expert moved against the tokens that it got."""
    with plt.rc_context(report.STYLE):
        figure, (loss, moved) = plt.subplots(1, 2, figsize=(11, 4), dpi=110, layout="constrained")
        for method, row in result["methods"].items():
            steps = np.arange(1, len(row["losses"]) + 1)
            loss.plot(steps, row["losses"], color=COLOURS[method], alpha=0.18, linewidth=0.8)
            loss.plot(steps, report.smooth(row["losses"]), color=COLOURS[method], linewidth=2, label=LABELS[method])
            tokens, change = np.array(row["tokens"]).ravel(), 100 * np.array(row["moved"]).ravel()
            moved.scatter(tokens, change, s=36, color=COLOURS[method], alpha=0.8, label=LABELS[method])
        loss.set(title="Loss on film reviews (thick: running mean)", xlabel="step", ylabel="cross entropy (nats)")
        loss.legend()
        moved.set(
            title="Every expert of every layer; closed ones at the origin",
            xlabel="tokens of the training texts",
            ylabel="change of its weights (%)",
        )
        moved.set(xlim=(None, None), ylim=(-0.5, None))
        moved.legend()
        figure.savefig(path)
        plt.close(figure)
