"""Which rank, which learning rate, which layers? A sweep of LoRA against full fine-tuning, many runs in one program.

python examples/sweep.py                                # five seeds: 45 minutes on two busy cores
python examples/sweep.py --seeds 0 --ranks 1 20
python examples/sweep.py --members 100 --mixed          # few large banks, for a machine with much memory

Runs that differ in learning rate, seed or rank are members of a bank (`jlora.bank`): one program trains them on one
base. A sweep that was stopped continues with the next bank. The task: short sentences of film reviews, for or against?
The last two layers of MiniLM-L6 are trained. The head is the encoder's own embeddings of two sentences and is not
trained, so that the learning rate is that of the encoder alone. Every run sees each sentence once. The settings are
those of "LoRA Without Regret" (Schulman et al. 2025): alpha 32 at every rank, Adam, one constant rate for A and B.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import assets
import report
import sweep_report
from sweep_runs import ALPHA, CLASSES, HELD_OUT, LENGTH, SHARPNESS, TRAIN, TRAINED_LAYERS, Run, Trainer, film_reviews

SEEDS = (0, 1, 2, 3, 4)
RANKS = (1, 4, 20, 128)
EQUAL = {"all": 20, "attention": 45, "MLP": 36}  # ranks at which each kind of layers trains 276,480 numbers
BATCH, LARGE_BATCH = 8, 64
LORA_RATES = {BATCH: (1e-4, 3e-4, 1e-3, 3e-3), LARGE_BATCH: (3e-4, 1e-3, 3e-3, 1e-2)}
FULL_RATES = {BATCH: (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), LARGE_BATCH: (3e-5, 1e-4, 3e-4, 1e-3)}
SETTINGS = {
    "trained_layers": TRAINED_LAYERS,
    "classes": list(CLASSES),
    "sharpness": SHARPNESS,
    "tokens": LENGTH,
    "train_sentences": TRAIN,
    "held_out_sentences": HELD_OUT,
    "alpha": ALPHA,
}


def plan(ranks: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    """All runs: ranks, then kinds of layers at equal parameters, then batch sizes; each seed once before the next."""
    cells: list[tuple[int | None, str, int]] = [(rank, "all", BATCH) for rank in (None, *ranks)]
    cells += [(rank, layers, BATCH) for layers, rank in EQUAL.items()]
    cells += [(rank, "all", LARGE_BATCH) for rank in (None, EQUAL["all"])]
    return [
        Run(rank, layers, batch, seed, rate)
        for seed, (rank, layers, batch) in itertools.product(seeds, dict.fromkeys(cells))
        for rate in (FULL_RATES if rank is None else LORA_RATES)[batch]
    ]


def banks(runs: Iterable[Run], members: int, mixed: bool = False) -> Iterator[list[Run]]:
    """Divides runs into banks of at most `members`: the rates of one rank and seed, or of all if `mixed`.

    Few large banks suit a machine with much memory. Mixed ranks are padded to the highest: fewer programs to compile,
    but more products. Kinds of layers and batch sizes are never mixed.
    """

    def program(run: Run) -> tuple[Any, ...]:
        return (run.rank is None, run.layers, run.batch) + (() if mixed else (run.rank, run.seed))

    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(program(run), []).append(run)
    for group in groups.values():
        yield from (group[start : start + members] for start in range(0, len(group), members))


def tflops(run: Run, highest: int | None = None) -> float:
    """Floating-point operations of a run on film reviews, in 10^12; in a bank padded to rank `highest` if it is given.

    A product with a frozen weight costs 4 operations for each number of the weight and token, forward and backward;
    with a trained one 6; 2 to measure.
    """
    factors = {"attention": 4 * (384 + 384), "MLP": 2 * (384 + 1536), "all": 6912}[run.layers]  # of a layer, for rank 1
    base = 4 * 384 * 384 + 2 * 384 * 1536
    training = 6 * base if run.rank is None else 4 * base + 6 * (highest or run.rank) * factors
    return TRAINED_LAYERS * LENGTH * (training * TRAIN + 2 * base * HELD_OUT) / 1e12


def sweep(
    train: Callable[[Sequence[Run]], list[dict[str, Any]]],
    groups: Sequence[Sequence[Run]],
    out: Path,
    result: dict[str, Any],
) -> None:
    """Trains the banks that `result` lacks, and writes `result` after each."""
    done = {Run(**{field.name: run[field.name] for field in dataclasses.fields(Run)}) for run in result["runs"]}
    total = sum(map(len, groups))
    with tqdm(total=total, desc="runs", unit="run", dynamic_ncols=True) as bar:
        for runs in groups:
            missing = [run for run in runs if run not in done]
            bar.update(len(runs) - len(missing))
            if not missing:
                continue
            first = missing[0]
            bar.set_postfix_str(f"rank {first.rank}, {first.layers}, batch {first.batch}, seed {first.seed}")
            result["runs"] += train(missing)
            out.parent.mkdir(parents=True, exist_ok=True)
            part = out.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(out)  # whenever the process is stopped, the file holds complete banks
            bar.update(len(missing))


def speed() -> float:
    """Operations per second of a matrix product here, in 10^9."""
    a, b = jnp.ones((4096, 384)), jnp.ones((384, 1536))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        product(a, b).block_until_ready()
    return 10 * 2 * a.size * b.shape[1] / 1e9 / (time.perf_counter() - start)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of LoRA on all layers")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--members", type=int, default=5, help="the most runs in one bank (default: 5)")
    parser.add_argument(
        "--mixed", action="store_true", help="all ranks and seeds in one bank, padded to the highest rank"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sweep/sweep.json"), help="results; the picture beside it"
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    result: dict[str, Any] = {"settings": SETTINGS, "environment": report.environment(), "runs": []}
    if options.out.exists():
        result = json.loads(options.out.read_text())
        if result.get("settings") != SETTINGS:
            print(f"error: {options.out} holds runs of other settings: give another --out", file=sys.stderr)
            return 2
    runs = plan(options.ranks, options.seeds)
    groups = list(banks(runs, options.members, options.mixed))
    cost, padded = (sum(tflops(run, highest) for run in runs) for highest in (None, max(options.ranks)))
    minutes = 1000 * cost / speed() / 60
    print(
        f"{len(runs)} runs in {len(groups)} banks: {cost:.0f} TFLOP; in banks of mixed ranks up to {padded:.0f}.\n"
        f"{minutes:.0f} minutes at the speed of a matrix product here and now; expect twice that."
    )
    try:
        task = film_reviews()
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    frozen = optax.softmax_cross_entropy_with_integer_labels(
        task.apply(task.params, task.held_out.ids, task.held_out.mask), task.held_out.labels
    )
    result["frozen_loss"] = round(float(frozen.mean()), 5)
    sweep(Trainer(task).train, groups, options.out, result)
    print("\n" + sweep_report.write(result["runs"], result["frozen_loss"], options.out.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
