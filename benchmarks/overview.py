"""Draws the README's picture: what one training step costs, from the results of `step` and `plan`.

python -m benchmarks.overview
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
# The same step in four forms, by its name in step.json and in plan.json.
FORMS = {
    "jlora": ("jlora", "jlora"),
    "LoRA written\ninto the model": ("by hand, flattened", "by hand"),
    "merge inside\nthe step": ("merge in the step", "merged"),
    "full\nfine-tuning": ("full fine-tuning", ""),
}


def main() -> None:
    """Reads the two files and writes the picture beside them."""
    steps = json.loads((RESULTS / "step.json").read_text())["unrolled"]["steps"]
    plans = json.loads((RESULTS / "plan.json").read_text())
    on_tpu, on_gpus = plans["block"], plans["8B bf16 h100:2"]
    panels = {
        "GFLOPs, small transformer": [steps[name]["flops"] / 1e9 for name, _ in FORMS.values()],
        "seconds, the same, two CPU cores": [steps[name]["seconds"] for name, _ in FORMS.values()],
        "GiB, 8 layers of Llama 3 8B, one TPU v5e": [
            on_tpu[name]["needed"] / 2**30 for _, name in FORMS.values() if name
        ],
        "GiB a card, Llama 3 8B, two H100": [on_gpus[name]["needed"] / 2**30 for _, name in FORMS.values() if name],
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 2.3), layout="constrained", sharey=True)
    names = list(FORMS)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        colours = ["tab:blue", *["lightsteelblue"] * (len(values) - 1)]
        bars = axis.barh(names[: len(values)], values, color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.18 * max(values))
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", labelsize=8)
    figure.savefig(RESULTS / "overview.png", dpi=110)


if __name__ == "__main__":
    main()
