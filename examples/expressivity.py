"""The rank of each method's update against the number of its trained parameters: a picture and a table.

    python examples/expressivity.py

Every method updates one kernel with Gaussian factors, in several sizes; the update's rank is measured in float64.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

import jlora

matplotlib.use("agg")
from matplotlib import pyplot

RANKS = (1, 2, 4, 8, 16, 32, 64)


def families(m: int, n: int) -> dict[str, list[jlora.Method]]:
    """Each method in several sizes, for an `(m, n)` kernel."""
    divisors = [r for r in RANKS if m % r == 0 and n % r == 0]
    row_divisors = [r for r in RANKS if m % r == 0]
    few, many = (1, 2, 3, 4), (1, 2, 3, 4, 6, 8, 12, 16)
    return {
        "LoRA": _sizes(jlora.LoRA, RANKS),
        "AdaLoRA": _sizes(jlora.AdaLoRA, RANKS),
        "DeLoRA": _sizes(jlora.DeLoRA, RANKS),
        "DoRA": _sizes(jlora.DoRA, RANKS),
        "Additive": _sizes(jlora.Additive, divisors),
        "MiSS": _sizes(jlora.MiSS, row_divisors),
        "Hadamard, k = 2": _sizes(lambda r: jlora.Hadamard(2 * r, 2), many),
        "Hadamard, k = 4": _sizes(lambda r: jlora.Hadamard(4 * r, 4), few),
        "Hadamard of additive, k = 2": _sizes(lambda r: jlora.Hadamard(2 * r, 2, "additive"), many[:-1]),
        "Hadamard of additive, k = 4": _sizes(lambda r: jlora.Hadamard(4 * r, 4, "additive"), few),
        "Hadamard of tanh": _sizes(lambda r: jlora.Hadamard(r, 1, "tanh"), (*few, 8)),
        "Hadamard of sigmoid": _sizes(lambda r: jlora.Hadamard(r, 1, "sigmoid"), (*few, 8)),
        "LoHa": _sizes(jlora.LoHa, many),
        "LoKr, factor 4": _sizes(lambda r: jlora.LoKr(r, factor=4), RANKS[:6]),
        "LoKr, factor 8": _sizes(lambda r: jlora.LoKr(r, factor=8), RANKS[:5]),
        "VeRA": _sizes(jlora.VeRA, (*RANKS, 96, 128)),
        "LoRA-XS": _sizes(jlora.LoRAXS, RANKS),
        "HRA": _sizes(jlora.HRA, RANKS[1:]),
        "RandLoRA": _sizes(jlora.RandLoRA, (4, 8, 16, 32)),
        "OFT": _sizes(jlora.OFT, row_divisors[1:]),
        "HiRA": _sizes(jlora.HiRA, RANKS[:4]),
        "FourierFT": _sizes(jlora.FourierFT, (10, 30, 100, 300, 1000)),
        "SHiRA": _sizes(jlora.SHiRA, RANKS[:4]),
        "IA3": [jlora.IA3()],
        "Full": [jlora.Full()],
    }


def _sizes(make: Callable[[int], jlora.Method], sizes: Iterable[int]) -> list[jlora.Method]:
    return [make(size) for size in sizes]


def measure(method: jlora.Method, m: int, n: int) -> tuple[int, int]:
    """The number of trained parameters, and the rank of the update with Gaussian factors."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(m, n)) / m**0.5)}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.zeros((1, m)))
    adapter = jlora.init(jax.random.key(0), sites, {"w": method}, params=params, dtype=jnp.float64)
    update = adapter["w"]
    factors = {name: jnp.asarray(rng.normal(size=f.shape)) for name, f in update.factors.items()}
    adapter = {"w": type(update)(factors, update.method, update.roles, update.shape, update.frozen)}
    delta = jlora.merge(params, adapter)["w"] - params["w"]
    return sum(f.size for f in factors.values()), int(np.linalg.matrix_rank(np.asarray(delta)))


def curves(m: int, n: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each method's sizes as (parameters, rank), by parameters."""
    kernel = jax.ShapeDtypeStruct((m, n), jnp.float64)
    site = jlora.trace(lambda p, x: x @ p["w"], {"w": kernel}, jax.ShapeDtypeStruct((1, m), jnp.float64))["w"]
    supported = {
        name: [method for method in methods if not method.unsupported_reason(site)]
        for name, methods in families(m, n).items()
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


def draw(points_by_name: dict[str, list[tuple[int, int]]], m: int, n: int, path: Path) -> None:
    """Draws one curve for each method."""
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for k, (name, points) in enumerate((name, points) for name, points in points_by_name.items() if points):
        count, rank = zip(*points, strict=True)
        marker = "os^DvPX"[k % 7]
        axes.plot(
            count, rank, marker=marker, markersize=4, linewidth=1.2, color=colours(2 * k % 20 + k // 10 % 2), label=name
        )
    axes.axhline(min(m, n), color="0.6", linestyle=":", linewidth=1)
    axes.axvline(m * n, color="0.6", linestyle=":", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(8, 2 * m * n),
        xlabel=f"trained parameters (the weight has {m * n:,})",
        ylabel="rank of the update",
    )
    axes.set_title(f"Rank of a {m} x {n} update, Gaussian factors")
    axes.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.grid(True, which="major", alpha=0.25)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Reads the options, measures, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(192, 384), metavar=("IN", "OUT"), help="default: 192 384"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "expressivity.png", help="default: beside this"
    )
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    m, n = options.shape
    points_by_name = dict(curves(m, n))
    draw(points_by_name, m, n, options.out)
    width = max(map(len, points_by_name))
    for name, points in points_by_name.items():
        print(f"{name:{width}}  " + "  ".join(f"{count:,}: {rank}" for count, rank in points))
    print(f"\nWritten to {options.out}")


if __name__ == "__main__":
    main()
