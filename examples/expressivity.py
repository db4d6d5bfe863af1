"""How high a rank each method's update reaches for the parameters that it trains: a picture and a table.

    python examples/expressivity.py

Every method updates one kernel with Gaussian factors, in several sizes; the update's rank is measured in float64.
"""

import argparse
import sys
from collections.abc import Iterator
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
    both = [r for r in RANKS if m % r == 0 and n % r == 0]
    return {
        "LoRA": [jlora.LoRA(r) for r in RANKS],
        "AdaLoRA": [jlora.AdaLoRA(r) for r in RANKS],
        "DeLoRA": [jlora.DeLoRA(r) for r in RANKS],
        "DoRA": [jlora.DoRA(r) for r in RANKS],
        "Additive": [jlora.Additive(r) for r in both],
        "MiSS": [jlora.MiSS(r) for r in RANKS if m % r == 0],
        "Hadamard, k = 2": [jlora.Hadamard(2 * r, 2) for r in (1, 2, 3, 4, 6, 8, 12, 16)],
        "Hadamard, k = 4": [jlora.Hadamard(4 * r, 4) for r in (1, 2, 3, 4)],
        "Hadamard of additive, k = 2": [jlora.Hadamard(2 * r, 2, "additive") for r in (1, 2, 3, 4, 6, 8, 12)],
        "Hadamard of additive, k = 4": [jlora.Hadamard(4 * r, 4, "additive") for r in (1, 2, 3, 4)],
        "Hadamard of tanh": [jlora.Hadamard(r, 1, "tanh") for r in (1, 2, 3, 4, 8)],
        "Hadamard of sigmoid": [jlora.Hadamard(r, 1, "sigmoid") for r in (1, 2, 3, 4, 8)],
        "LoHa": [jlora.LoHa(r) for r in (1, 2, 3, 4, 6, 8, 12, 16)],
        "LoKr, factor 4": [jlora.LoKr(r, factor=4) for r in RANKS[:6]],
        "LoKr, factor 8": [jlora.LoKr(r, factor=8) for r in RANKS[:5]],
        "VeRA": [jlora.VeRA(r) for r in (*RANKS, 96, 128)],
        "LoRA-XS": [jlora.LoRAXS(r) for r in RANKS],
        "HRA": [jlora.HRA(r) for r in RANKS[1:]],
        "RandLoRA": [jlora.RandLoRA(r) for r in (4, 8, 16, 32)],
        "OFT": [jlora.OFT(r) for r in RANKS[1:] if m % r == 0],
        "HiRA": [jlora.HiRA(r) for r in RANKS[:4]],
        "FourierFT": [jlora.FourierFT(k) for k in (10, 30, 100, 300, 1000)],
        "SHiRA": [jlora.SHiRA(r) for r in RANKS[:4]],
        "IA3": [jlora.IA3()],
        "Full": [jlora.Full()],
    }


def measure(method: jlora.Method, m: int, n: int) -> tuple[int, int]:
    """The number of trained parameters, and the rank of the update."""
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
    made = {
        name: [method for method in methods if not method.unsupported_reason(site)]
        for name, methods in families(m, n).items()
    }
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tqdm(total=sum(map(len, made.values())), unit="update", mininterval=interval) as bar:
        for name, methods in made.items():
            points = []
            for method in methods:
                bar.set_description(name)
                points.append(measure(method, m, n))
                bar.update()
            yield name, sorted(points)


def draw(found: dict[str, list[tuple[int, int]]], m: int, n: int, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours = pyplot.colormaps["tab20"].colors
    for k, (name, points) in enumerate((name, points) for name, points in found.items() if points):
        count, rank = zip(*points, strict=True)
        marker = "os^DvPX"[k % 7]
        axes.plot(
            count, rank, marker=marker, markersize=4, linewidth=1.2, color=colours[2 * k % 20 + k // 10 % 2], label=name
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(192, 384), metavar=("IN", "OUT"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "expressivity.png")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    m, n = options.shape
    found = dict(curves(m, n))
    draw(found, m, n, options.out)
    width = max(map(len, found))
    for name, points in found.items():
        print(f"{name:{width}}  " + "  ".join(f"{count:,}: {rank}" for count, rank in points))
    print(f"\nWritten to {options.out}")


if __name__ == "__main__":
    main()
