"""The rank of each method's update against the number of its trained parameters: a picture and a table.

    python examples/expressivity.py --out benchmarks/results/expressivity.png

Every method updates one kernel with Gaussian factors, in several sizes; the update's rank is measured in float64.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

import jlora
import report

matplotlib.use("agg")
from matplotlib import pyplot

RANKS = (1, 2, 4, 8, 16, 32, 64)
Point = tuple[int, int]  # trained parameters, rank


def families(m: int, n: int) -> dict[str, dict[str, list[jlora.Method]]]:
    """For each panel of the picture its methods, each in several sizes, for an `(m, n)` kernel.

    Left out are methods for convolutions and experts, and those whose update is another's: MonteCLoRA and PVeRA with
    noise added in training, `Rows`, and `SharedLoRA`.
    """
    divisors = [r for r in RANKS if m % r == 0 and n % r == 0]
    row_divisors = [r for r in RANKS if m % r == 0]
    few, many = (1, 2, 3, 4), (1, 2, 3, 4, 6, 8, 12, 16)
    products = {
        "LoRA": _sizes(jlora.LoRA, RANKS),
        "DoRA": _sizes(jlora.DoRA, RANKS),
        "AdaLoRA": _sizes(jlora.AdaLoRA, RANKS),
        "DeLoRA": _sizes(jlora.DeLoRA, RANKS),
        "KaSA": _sizes(jlora.KaSA, RANKS),
        "OSF": _sizes(jlora.OSF, RANKS),
        "PSOFT": _sizes(jlora.PSOFT, RANKS[1:]),
        "LoRA-XS": _sizes(jlora.LoRAXS, RANKS),
        "AdaMSS, 5 subspaces": _sizes(lambda r: jlora.AdaMSS(64, 5, r), many),
        "TinyLoRA, 64 numbers": _sizes(lambda r: jlora.TinyLoRA(r, 64), RANKS),
        "VB-LoRA": _sizes(lambda r: jlora.VBLoRA(r, 64, 96), RANKS[:5]),
        "UniLoRA": _sizes(lambda r: jlora.UniLoRA(r, 64 * r), RANKS),
        "VeRA": _sizes(jlora.VeRA, (*RANKS, 96, 128)),
        "MiSS": _sizes(jlora.MiSS, row_divisors),
        "Additive": _sizes(jlora.Additive, divisors),
        "DEFT": _sizes(jlora.DEFT, RANKS),
        "PaRa": _sizes(jlora.PaRa, RANKS),
        "PEANuT": _sizes(jlora.PEANuT, RANKS),
    }
    blocks = {
        "GroupedLoRA, 3 groups": _sizes(lambda r: jlora.GroupedLoRA(r, groups=3), RANKS),
        "BD-LoRA, 4 blocks": _sizes(lambda r: jlora.BDLoRA(4 * r, blocks=4), RANKS[:5]),
        "QA-LoRA, groups of 8": _sizes(lambda r: jlora.QALoRA(r, group=8), RANKS[:4]),
        "GraLoRA, k = 2": _sizes(lambda r: jlora.GraLoRA(2 * r, k=2), RANKS[:6]),
        "LoHa": _sizes(jlora.LoHa, many),
        "Hadamard, k = 2": _sizes(lambda r: jlora.Hadamard(2 * r, 2), many),
        "Hadamard, k = 4": _sizes(lambda r: jlora.Hadamard(4 * r, 4), few),
        "Hadamard of additive, k = 2": _sizes(lambda r: jlora.Hadamard(2 * r, 2, "additive"), many[:-1]),
        "Hadamard of additive, k = 4": _sizes(lambda r: jlora.Hadamard(4 * r, 4, "additive"), few),
        "Hadamard of tanh": _sizes(lambda r: jlora.Hadamard(r, 1, "tanh"), (*few, 8)),
        "Hadamard of sigmoid": _sizes(lambda r: jlora.Hadamard(r, 1, "sigmoid"), (*few, 8)),
        "LoKr, factor 4": _sizes(lambda r: jlora.LoKr(r, factor=4), RANKS[:6]),
        "LoKr, factor 8": _sizes(lambda r: jlora.LoKr(r, factor=8), RANKS[:5]),
        "HiRA": _sizes(jlora.HiRA, RANKS[:4]),
        "RandLoRA": _sizes(jlora.RandLoRA, (4, 8, 16, 32)),
    }
    others = {
        "OFT": _sizes(jlora.OFT, row_divisors[1:]),
        "BOFT": _sizes(lambda block: jlora.BOFT(block, 2), row_divisors[1:]),
        "HRA": _sizes(jlora.HRA, RANKS[1:]),
        "RoAd": [jlora.RoAd(variant) for variant in (1, 2, 4)],
        "IA3": [jlora.IA3()],
        "GLoRA": _sizes(jlora.GLoRA, RANKS),
        "C3A": _sizes(jlora.C3A, (6, 12, 24, 48, 96)),
        "FourierFT": _sizes(jlora.FourierFT, (10, 30, 100, 300, 1000)),
        "WaveFT": _sizes(jlora.WaveFT, (10, 30, 100, 300, 1000)),
        "SHiRA": _sizes(jlora.SHiRA, RANKS[:4]),
        "Super-Tuning": [jlora.SuperTuning(sparsity) for sparsity in (0.999, 0.997, 0.99, 0.97)],
        "FRoD": [jlora.FRoD(density) for density in (0.001, 0.01, 0.1)],
        "Full": [jlora.Full()],
    }
    return {
        "Products of thin factors": products,
        "Blocks, entrywise products, sums": blocks,
        "Maps, sparse and transformed": others,
    }


def _sizes(make: Callable[[int], jlora.Method], sizes: Iterable[int]) -> list[jlora.Method]:
    return [make(size) for size in sizes]


def measure(method: jlora.Method, m: int, n: int) -> tuple[int, int]:
    """The number of trained parameters, and the rank of the update with Gaussian factors."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(m, n)) / m**0.5)}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.zeros((1, m)))
    adapter = jlora.init(jax.random.key(0), sites, {"w": method}, params=params, dtype=jnp.float64)
    is_trained = jax.tree.map(lambda label: label != "frozen", jlora.labels(adapter))
    adapter = jax.tree.map(
        lambda leaf, trained: jnp.asarray(rng.normal(size=leaf.shape)) if trained else leaf, adapter, is_trained
    )
    delta = jlora.merge(params, adapter)["w"] - params["w"]
    trained = sum(jax.tree.leaves(jax.tree.map(lambda leaf, trained: leaf.size * trained, adapter, is_trained)))
    return trained, int(np.linalg.matrix_rank(np.asarray(delta)))


def curves(methods_by_name: dict[str, list[jlora.Method]], m: int, n: int) -> Iterator[tuple[str, list[Point]]]:
    """Each method's sizes as (parameters, rank), by parameters."""
    kernel = jax.ShapeDtypeStruct((m, n), jnp.float64)
    site = jlora.trace(lambda p, x: x @ p["w"], {"w": kernel}, jax.ShapeDtypeStruct((1, m), jnp.float64))["w"]
    supported = {
        name: [method for method in methods if not method.unsupported_reason(site)]
        for name, methods in methods_by_name.items()
    }
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tqdm(total=sum(map(len, supported.values())), unit="update", mininterval=interval) as bar:
        for name, methods in supported.items():
            points = []
            for method in methods:
                bar.set_description(name)
                points.append(measure(method, m, n))
                bar.update()
            yield name, sorted(points)


def draw(panels: dict[str, dict[str, list[Point]]], m: int, n: int, path: Path) -> None:
    """Draws a curve for each method. LoRA's is in every panel, in grey."""
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(17, 7.5), layout="constrained", sharey=True)
    colours = pyplot.get_cmap("tab20")
    lora = next(iter(panels.values()))["LoRA"]
    for axes, (title, points_by_name) in zip(all_axes, panels.items(), strict=True):
        axes.plot(*zip(*lora, strict=True), color="0.75", linewidth=6, zorder=0, label="LoRA")
        drawn = ((name, points) for name, points in points_by_name.items() if points and name != "LoRA")
        for k, (name, points) in enumerate(drawn):
            colour = colours(2 * k % 20 + k // 10 % 2)
            count, rank = zip(*points, strict=True)
            axes.plot(count, rank, marker="os^DvPX"[k % 7], markersize=4, linewidth=1.2, color=colour, label=name)
        axes.axhline(min(m, n), color="0.6", linestyle=":", linewidth=1)
        axes.axvline(m * n, color="0.6", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlim=(3, 2 * m * n), title=title, xlabel="trained parameters")
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
        axes.grid(True, which="major", alpha=0.25)
    all_axes[0].set_ylabel("rank of the update")
    figure.suptitle(f"Rank of a {m} x {n} update, Gaussian factors (the weight has {m * n:,} numbers)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the options, measures, draws, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(192, 384), metavar=("IN", "OUT"), help="default: 192 384"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/expressivity.png"),
        help="picture, with a JSON file beside it (default: runs/expressivity.png)",
    )
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    m, n = options.shape
    panels = {title: dict(curves(methods, m, n)) for title, methods in families(m, n).items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels, m, n, options.out)
    result = {"environment": report.environment(), "shape": [m, n], "seed": 0, "points": panels}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    width = max(len(name) for points_by_name in panels.values() for name in points_by_name)
    for title, points_by_name in panels.items():
        print(f"{title} (trained parameters: rank)")
        for name, points in points_by_name.items():
            print(f"  {name:{width}}  " + "  ".join(f"{count:,}: {rank}" for count, rank in points))
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
