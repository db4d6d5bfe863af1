"""The report of a fine-tuning run: Markdown, JSON, and a picture of the learning curves."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from training import History

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"LoRA": "#1f6f8b", "full": "#d1495b", "head alone": "#6c757d"}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def environment() -> dict[str, Any]:
    """What times and numbers of a run depend on besides the code: versions, device, cores and load."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def record(file: Path, keys: tuple[str, ...], result: dict[str, Any]) -> None:
    """Writes the result of one run into a file that holds those of many, `{"runs": {key: {key: result}}}`."""
    results = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    place = results["runs"]
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = result
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results | {"environment": environment()}, indent=1, ensure_ascii=False) + "\n")


def size(tree: Any) -> int:
    """The number of elements in the arrays of `tree`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def bytes_in_memory(tree: Any) -> int:
    """The bytes of the arrays of `tree`."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bytes_on_disk(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def write(folder: Path, result: dict[str, Any], runs: dict[str, History]) -> str:
    """Writes `report.md`, `report.json` and `curves.png` into `folder`; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = {
        name: {
            "loss": history.losses,
            "validated": history.validated,
            "seconds": history.seconds,
            "tokens_per_second": history.tokens / history.seconds,
        }
        for name, history in runs.items()
    }
    result["environment"] = environment()
    (folder / "report.json").write_text(json.dumps(result | {"runs": curves}, indent=1) + "\n")
    draw(folder / "curves.png", result, runs)
    text = markdown(result, runs)
    (folder / "report.md").write_text(text + "\n\n![learning curves](curves.png)\n")
    return text + f"\n\nWritten to {folder}: report.md, report.json, curves.png, adapter, head.safetensors"


def markdown(result: dict[str, Any], runs: dict[str, History]) -> str:
    """The report: a table of the runs and a list of settings."""
    settings, sizes, accuracy = result["settings"], result["parameters"], result["accuracy"]
    merged, on_disk, sentences = result["merged"], result["bytes"], result["sentences"]
    rows = [("head alone", "head", None), ("LoRA", "LoRA", runs["LoRA"])]
    if "full" in runs:
        rows.append(("full", "full", runs["full"]))
    table = [
        "| trained | parameters | share of the encoder | test accuracy | training |",
        "| --- | --: | --: | --: | --: |",
    ]
    for name, key, history in rows:
        speed = f"{history.seconds:.0f} s, {history.tokens / history.seconds:,.0f} tokens/s" if history else "-"
        share = f"{100 * sizes[key] / sizes['base']:.2g}%" if name != "full" else "100%"
        table.append(f"| {name} | {sizes[key]:,} | {share} | {accuracy[name]:.1%} | {speed} |")
    lines = [
        "# MiniLM-L6 on film-review sentences",
        "",
        *table,
        "",
        f"- LoRA of rank {settings['rank']}, alpha {settings['alpha']}, peak learning rate {settings['lr']:g}, "
        f"{settings['steps']} steps of {settings['batch']} sentences, seed {settings['seed']}, base {settings['base']}",
        f"- targets `{settings['targets']}`",
        f"- {sentences['train']:,} sentences to train on, {sentences['validation']} for validation, "
        f"{sentences['test']:,} to test",
        f"- the saved adapter takes {on_disk['adapter']:,} bytes, the encoder {on_disk['base']:,}",
        f"- merged into plain parameters: accuracy {merged['accuracy']:.1%}, logits within "
        f"{merged['max_abs_difference']:.1e} of the adapted ones (the largest is {merged['largest_logit']:.1f})",
        f"- {result['seconds']:.0f} s in all, compilation included",
    ]
    return "\n".join(lines)


def smooth(values: list[float], weight: float = 0.95) -> np.ndarray:
    """An exponential running mean with bias correction."""
    means, total, mean = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        means.append(mean / total)
    return np.array(means)


def draw(path: Path, result: dict[str, Any], runs: dict[str, History]) -> None:
    """Draws the training loss, the validation accuracy during training, and the final test accuracy."""
    settings, accuracy = result["settings"], result["accuracy"]
    with plt.rc_context(STYLE):
        figure, (loss, validation, test) = plt.subplots(
            1, 3, figsize=(12.5, 4), dpi=150, layout="constrained", width_ratios=[2.2, 2, 1.5]
        )
        figure.suptitle(
            f"MiniLM-L6 on film-review sentences: LoRA of rank {settings['rank']}, seed {settings['seed']}",
            fontweight="bold",
        )
        for name, history in runs.items():
            steps = np.arange(1, len(history.losses) + 1)
            loss.plot(steps, history.losses, color=COLOURS[name], alpha=0.18, linewidth=0.8)
            loss.plot(steps, smooth(history.losses), color=COLOURS[name], linewidth=2, label=name)
            steps, accuracies = zip(*history.validated, strict=True)
            validation.plot(steps, 100 * np.array(accuracies), "o-", color=COLOURS[name], linewidth=2, label=name)
            validation.set_xticks(steps)
        loss.set(
            title="Training loss (thick: running mean)", xlabel="step", ylabel="cross entropy (nats)", ylim=(0, None)
        )
        loss.legend()
        validation.set(
            title=f"Validation, {result['sentences']['validation']} sentences",
            xlabel="step, at the end of each epoch",
            ylabel="accuracy (%)",
        )
        validation.margins(y=0.2)
        validation.legend(loc="lower right")

        bars = test.bar(
            list(accuracy),
            [100 * value for value in accuracy.values()],
            0.6,
            color=[COLOURS[name] for name in accuracy],
        )
        test.bar_label(bars, fmt="%.1f%%", padding=2, fontweight="bold")
        test.set(title=f"Test, {result['sentences']['test']:,} sentences", ylabel="accuracy (%)", ylim=(50, 100))
        test.grid(visible=False, axis="x")
        figure.savefig(path)
        plt.close(figure)
