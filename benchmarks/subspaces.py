"""What adapters of different rank and seed learn in common, and which directions of a weight they amplify.

    PYTHONPATH=examples python -m benchmarks.subspaces    # three runs of about a minute on two cores

Section 7 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685), with the task of benchmarks/quality.py: LoRA on the
query and value kernels of the upper half of MiniLM-L6, film reviews, one epoch. The runs differ in the start of A and
in the order of the sentences. Every trained adapter is saved at once in `--runs`, and a run that is there is read.
"""

import functools
import json
import operator
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import assets
import jlora
import minilm
from benchmarks import _measure, _subspaces_report, quality

TARGETS = r"params/layer_\d+/attention/(query|value)/kernel"
ALPHA, LEARNING_RATE = 16.0, 2e-3  # at every rank: the paper sets alpha once


@dataclass(frozen=True)
class Run:
    """A training run."""

    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, and in the results."""
        return f"rank {self.rank}, seed {self.seed}"


RUNS = (Run(8, 0), Run(64, 1), Run(64, 2))
GRID = (*range(1, 9), 12, 16, 24, 32, 48, 64)  # numbers of directions in the results
# Which runs are compared; None is a Gaussian matrix of the shape of the other's.
PAIRS: dict[str, tuple[Run, Run | None]] = {
    "two ranks": (RUNS[0], RUNS[1]),
    "two seeds": (RUNS[1], RUNS[2]),
    "a seed and random": (RUNS[1], None),
}


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share that the spans of the first i columns of U and the first j columns of V have in common, for all i, j.

        phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j)

    Arguments:
        first: U, orthonormal columns (n, p).
        second: V, orthonormal columns (n, q).

    Returns:
        phi (p, q), entry [i - 1, j - 1] for the first i and the first j columns, from 0 (orthogonal) to 1 (one span
        contains the other).
    """
    sums = np.square(first.T @ second).cumsum(0).cumsum(1)
    counts = [np.arange(1, size + 1) for size in sums.shape]
    return sums / np.minimum.outer(*counts)


def directions(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The left (n, rank) and right (m, rank) singular vectors of a matrix (n, m), as columns, the largest first."""
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], right[:rank].T


def projection(weight: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """What a weight (n, m) does in the span of the columns of `left` (n, r) and `right` (m, r): ||U^T W V||_F."""
    return float(np.linalg.norm(left.T @ weight @ right))


def amplification(weight: np.ndarray, update: np.ndarray, rank: int, rng: np.random.Generator) -> dict[str, float]:
    """How much an update enlarges the directions of the weight that it changes.

        factor = ||D||_F / ||U^T W V||_F,    D = U S V^T

    Arguments:
        weight: W (n, m).
        update: D (n, m), of the rank `rank`.
        rng: of the random directions.

    Returns:
        the norms of weight and update, the norm of the weight in the update's directions, in its own first `rank` ones
        and in `rank` random ones, and the factor.
    """
    norm = float(np.linalg.norm(update))
    inside = projection(weight, *directions(update, rank))
    return {
        "weight": float(np.linalg.norm(weight)),
        "update": norm,
        "in the update's directions": inside,
        "in its own directions": projection(weight, *directions(weight, rank)),
        "in random directions": projection(weight, *directions(rng.standard_normal(weight.shape), rank)),
        "factor": norm / inside,
    }


class Kernel:
    """One kernel and what every run adds to it, as matrices (in, out) in float64."""

    def __init__(self, path: str, params: Any, adapters: Mapping[Run, jlora.Adapter]) -> None:
        weight = np.asarray(functools.reduce(operator.getitem, path.split("/"), params), np.float64)
        size = len(weight)  # queries and values have one input axis
        self.weight = weight.reshape(size, -1)
        self.a: dict[Run, np.ndarray] = {}
        self.update: dict[Run, np.ndarray] = {}
        for run, adapter in adapters.items():
            update = adapter[path]
            self.a[run] = np.asarray(update.factors["a"], np.float64)
            self.update[run] = update.method.scale * self.a[run] @ np.asarray(update.factors["b"]).reshape(run.rank, -1)

    def similarity(self, first: Run, second: Run | None, rng: np.random.Generator) -> np.ndarray:
        """phi of the directions of two factors A, or of one and of a Gaussian matrix of its shape."""
        matrices = [self.a[first], rng.standard_normal(self.a[first].shape) if second is None else self.a[second]]
        return similarity(*(directions(matrix, matrix.shape[1])[0] for matrix in matrices))


def compare(params: Any, adapters: Mapping[Run, jlora.Adapter], pairs: Mapping[str, tuple[Run, Run | None]]) -> Any:
    """All similarities and amplifications.

    Returns:
        {path: {"similarity": {pair: phi}, "amplification": {run: row}}} of every adapted kernel, phi at the numbers of
        directions in `GRID`.
    """
    rng = np.random.default_rng(0)
    out = {}
    for path in next(iter(adapters.values())):
        kernel = Kernel(path, params, adapters)
        out[path] = {
            "similarity": {pair: on_grid(kernel.similarity(*runs, rng)) for pair, runs in pairs.items()},
            "amplification": {
                run.name: amplification(kernel.weight, kernel.update[run], run.rank, rng) for run in adapters
            },
        }
    return out


def on_grid(phi: np.ndarray) -> list[list[float]]:
    """The entries of phi at the numbers of directions in `GRID`."""
    rows, columns = ([count - 1 for count in GRID if count <= size] for size in phi.shape)
    return phi[np.ix_(rows, columns)].round(4).tolist()


def trained(run: Run, folder: Path, steps: int) -> tuple[jlora.Adapter, dict[str, Any]]:
    """The adapter of a run and what the run measured, from its folder if it is there."""
    record = folder / f"{run.name}.json"
    if not (folder / run.name).exists():
        task = make_task()
        adapter, head, history = task.fit(
            {TARGETS: jlora.LoRA(run.rank, ALPHA)}, run.seed, steps, LEARNING_RATE, run.name
        )
        measured = {
            "accuracy": task.accuracy(head, jlora.merge(task.variables, adapter)),
            "loss": statistics.mean(history.losses[-20:]),
            "seconds": history.seconds,
            "steps": steps,
        }
        _measure.save(record, measured)
        jlora.save(folder / run.name, adapter, params=task.variables)
    measured = json.loads(record.read_text())
    if measured["steps"] != steps:
        raise ValueError(f"{record} is of a run of {measured['steps']} steps, not {steps}: give another --runs.")
    return jlora.load(folder / run.name), measured


make_task = functools.cache(quality.Task)  # made by the first run: it downloads and encodes


def main() -> None:
    """Trains what is missing, compares, saves and draws."""
    parser = _measure.parser(__doc__, "subspaces.json")
    parser.add_argument("--steps", type=int, default=93, help="of 32 sentences (default: 93, one epoch)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/subspaces"), help="folder of adapters (default: runs/subspaces)"
    )
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())  # seeds share their compiled programs
    runs = {run: trained(run, options.runs, options.steps) for run in RUNS}
    model, variables = minilm.load(assets.minilm())
    settings = {"steps": options.steps, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "grid": GRID}
    result = {
        "environment": _measure.environment(),
        "settings": settings | {"width": model.width},
        "runs": {run.name: asdict(run) | measured for run, (_, measured) in runs.items()},
        "kernels": compare(variables, {run: adapter for run, (adapter, _) in runs.items()}, PAIRS),
    }
    _measure.save(options.out, result)
    _subspaces_report.draw(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
