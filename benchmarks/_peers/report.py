"""Limits, tables and the picture of `benchmarks.peers`, from its result file."""

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks import _measure
from benchmarks._measure import Bar
from benchmarks._peers.environments import JLORA, TORCH

RESULT = _measure.RESULTS / "peers.json"
BY_HAND, FULL = "by hand", "full fine-tuning"
FLOPS_OF_FULL, SECONDS_OF_FULL = 0.70, 0.75

Rows = dict[str, dict[str, Any]]


def check_same_work(rows: Rows) -> None:
    """Every library has the same loss on the weights alone, the reference's with its factors, and as many factors.

    Raises:
        ValueError: if one has not.
    """
    hand = rows[BY_HAND]
    for name, row in rows.items():
        base, loss, reference = row["base_loss"], row["loss"], row["reference_loss"]
        if abs(base / hand["base_loss"] - 1) > 1e-5:
            raise ValueError(f"{name} has the loss {base} on the weights alone, by hand {hand['base_loss']}.")
        if name == FULL:
            bound = 1e-5 * base
        elif row["trained"] != hand["trained"] or reference == base:
            raise ValueError(f"{name} trains {row['trained']} numbers, by hand {hand['trained']}; none may be idle.")
        else:
            bound = 0.05 * abs(reference - base)
        if abs(loss - reference) > bound:
            raise ValueError(f"{name} has the loss {loss}, but {reference} on W + s A B written by hand.")


def bars(rows: Rows, width: int) -> list[Bar]:
    """The limits of jlora: against by hand, the libraries for JAX, and full fine-tuning.

    Full fine-tuning is a limit if LoRA by hand is within it, too: long sequences and large ranks cost more.
    """
    ours, hand, full = (rows.get(name) for name in (JLORA.name, BY_HAND, FULL))
    assert ours
    assert hand
    out = [
        Bar("FLOPs / by hand", ours["flops"] / hand["flops"], 1.005),
        Bar("temporary bytes / by hand", ours["temp_bytes"] / hand["temp_bytes"], 1.0),
    ]
    comparable = full and hand["flops"] / full["flops"] <= FLOPS_OF_FULL
    if full and comparable:
        out.append(Bar("FLOPs / full fine-tuning", ours["flops"] / full["flops"], FLOPS_OF_FULL))
    limits = {BY_HAND: 1.03, FULL: SECONDS_OF_FULL if width >= 512 and comparable else None, TORCH.name: None}
    for name in rows if ours["rounds"] else ():
        limit = limits.get(name, 1.0)
        if name != JLORA.name and limit is not None:
            times = {each: rows[each]["rounds"] for each in (JLORA.name, name)}
            out.append(Bar(f"seconds / {name}", _measure.ratio(times, JLORA.name, name), limit))
    return out


def results() -> dict[str, Any]:
    """The saved rows, by size."""
    return json.loads(RESULT.read_text())["rows"]


def of_one_size(row: dict[str, Any]) -> str:
    """The figures of every library at one size."""
    body = []
    for name, library in row["libraries"].items():
        milliseconds = sorted(1e3 * seconds for seconds in library["rounds"])
        spread = f"{milliseconds[0]:.0f} to {milliseconds[-1]:.0f}" if milliseconds else ""
        body.append(
            [
                name,
                _measure.number(_scaled(library["flops"], 1e9), 2),
                _measure.number(_scaled(library["temp_bytes"], 1e6), 1),
                _measure.number(library["compile_seconds"], 1),
                _measure.number(_scaled(library["seconds"], 1e-3), 0),
                spread,
                _measure.number(library["of_by_hand"], 2),
                f"{library['peak_bytes'] / 1e6:.0f}",
                f"{library['imported_bytes'] / 1e6:.0f}",
            ]
        )
    header = ["step", "GFLOPs", "temporary MB", "compile s", "step ms", "least to most", "of by hand", "process MB"]
    return _measure.table([*header, "of these imports"], body)


def table() -> str:
    """The figures at the default size."""
    return of_one_size(results()["default"])


def by_size(key: str, unit: float, digits: int) -> str:
    """One figure of every library at every size, in a unit."""
    rows = results()
    names = list(dict.fromkeys(name for row in rows.values() for name in row["libraries"]))
    body = []
    for size, row in rows.items():
        values = [_scaled(row["libraries"].get(name, {}).get(key), unit) for name in names]
        body.append([size, *(_measure.number(value, digits) for value in values)])
    return _measure.table(["size", *names], body)


def all_missed() -> str:
    """On what the times were measured, and the limits that jlora misses at any size."""
    rows = results()
    one, *_ = environments = [row["environment"] for row in rows.values()]
    loads = sorted(environment["load"] for environment in environments)
    where = f"JAX {one['jax']}, {one['cores']} cores, a load of {loads[0]:.1f} to {loads[-1]:.1f} before each size"
    lines = [f"{size}: {line}" for size, row in rows.items() for line in _missed(row)]
    number = sum(len(row["bars"]) for row in rows.values())
    kept = f"{where}: {number - len(lines)} of {number} limits are kept."
    return "\n".join([kept, *(f"- {line}" for line in lines)])


def missed(row: dict[str, Any]) -> str:
    """The limits that jlora misses at one size."""
    return "\n".join(_missed(row)) or f"All {len(row['bars'])} limits are kept."


def _missed(row: dict[str, Any]) -> list[str]:
    lost = [bar for bar in row["bars"] if not bar["passed"]]
    return [f"{bar['name']} is {bar['value']:.3f}, and may be {bar['limit']:.3f}" for bar in lost]


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


# The picture's panels: what the axis counts, and the sizes on it.
PANELS = {
    "parameters": ("1M parameters", "default", "31M parameters", "105M parameters"),
    "tokens of a step": ("64 tokens", "default", "16 x 128 tokens"),
    "rank": ("rank 1", "default", "rank 64", "rank 256"),
}


def draw(file: Path) -> None:
    """Draws the median step of every library in units of by hand's against the sizes, beside the result file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = json.loads(file.read_text())["rows"]
    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained", sharey=True)
    names = [name for name in rows["default"]["libraries"] if name != BY_HAND]
    styles: dict[str, Any] = {name: {"color": f"C{k}"} for k, name in enumerate(names)} | {  # C0 is jlora's
        JLORA.name: {"color": "tab:blue", "linewidth": 2.5, "zorder": 3},
        FULL: {"color": "black", "linestyle": ":"},
    }
    for axis, (title, sizes) in zip(axes, PANELS.items(), strict=True):
        axis.axhline(1, color="black", linewidth=0.8)
        for name in names:
            measured = [rows[size] for size in sizes if name in rows.get(size, {}).get("libraries", {})]
            points = [(_place(title, row["sizes"]), row["libraries"][name]["of_by_hand"]) for row in measured]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **styles.get(name, {}))
        axis.set(xscale="log", xlabel=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds of a step, of by hand's")
    axes[0].set_ylim(0, min(4.0, axes[0].get_ylim()[1]))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    # A test reads of which file the picture is.
    figure.savefig(file.with_suffix(".png"), dpi=110, metadata={"Description": digest(file)})


def digest(file: Path) -> str:
    """The SHA-256 sum of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _place(title: str, sizes: dict[str, int]) -> int:
    if title == "rank":
        return sizes["rank"]
    if title != "parameters":
        return sizes["batch"] * sizes["length"]
    layers, width, vocabulary, length = (sizes[name] for name in ("layers", "width", "vocabulary", "length"))
    return layers * (12 * width**2 + 2 * width) + width * (2 * vocabulary + length + 1)
