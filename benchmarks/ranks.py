"""Which weights to adapt, and with which rank: film reviews with MiniLM-L6, all ranks and seeds as one program.

    PYTHONPATH=examples python -m benchmarks.ranks                  # 105 runs in 7 banks
    PYTHONPATH=examples python -m benchmarks.ranks --targets Wq --ranks 1 8 --seeds 0 --steps 4 --out ranks.json

Table 6 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685), with the model and sentences of benchmarks/quality.py: the
upper half of the encoder and a head are trained. The runs of one row, with all ranks and seeds, are members of one bank
(`jlora.bank`), padded to the highest rank. Runs with one seed see the same batches. Each bank is saved at once, and a
program that was stopped continues with the next one. One run is trained by itself too, without a bank.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
import training
from benchmarks import _measure, _ranks_report, quality
from reviews import Split
from train_many import Job

ATTENTION = r"encoder/params/layer_\d+/attention/"
TARGETS = {
    "Wq": ATTENTION + "query/kernel",
    "Wk": ATTENTION + "key/kernel",
    "Wv": ATTENTION + "value/kernel",
    "Wo": ATTENTION + "out/kernel",
    "Wq, Wv": ATTENTION + "(query|value)/kernel",
    "all of attention": ATTENTION + r"\w+/kernel",
    "all linears": f"encoder/{quality.TARGETS}",
}
RANKS, SEEDS = (1, 2, 4, 8, 64), (0, 1, 2)
ALPHA, LEARNING_RATE, BATCH = 16.0, 2e-3, 16  # at every rank


@dataclass(frozen=True)
class Run:
    """A training run: a cell of the table, and a seed of its factors and of the order of its sentences."""

    targets: str
    rank: int
    seed: int


def load(test: int) -> Job:
    """The upper half of the encoder with a head, and `test` of the test sentences."""
    task = quality.Task()
    head = training.init_head(jax.random.key(0), task.width, classes=2)
    held_out = Split(*(array[:test] for array in task.test))
    params = {"encoder": task.variables, "head": head}
    return Job(params, task.model.apply, {"reviews": task.train}, {"reviews": held_out})


def new_adapter(job: Job, sites: jlora.Sites, run: Run) -> jlora.Adapter:
    """The adapter that a run starts with, with the head."""
    targets = {"head/.*": jlora.Full(), TARGETS[run.targets]: jlora.LoRA(run.rank, ALPHA)}
    return jlora.init(jax.random.key(run.seed), sites, targets)


def trace(job: Job) -> jlora.Sites:
    """The weights of the model."""
    texts = next(iter(job.train.values()))
    return jlora.trace(job.classify, job.params, texts.ids[:1], texts.mask[:1])


def train_bank(job: Job, runs: Sequence[Run], steps: int) -> list[dict[str, Any]]:
    """Trains runs with the same targets as one bank; returns what each measured."""
    sites, (train,), (test,) = trace(job), job.train.values(), job.test.values()
    adapters = {str(k): new_adapter(job, sites, run) for k, run in enumerate(runs)}
    bank = jlora.bank.stack(adapters)
    optimiser = jlora.bank.optimiser(training.adamw(LEARNING_RATE, steps))
    state = optimiser.init(cast(Any, bank))
    loss = training.mean_loss(lambda _, params, *texts: job.classify(params, *texts))

    @jax.jit
    def step(bank: Any, state: Any, params: Any, texts: Split) -> tuple[Any, Any, jax.Array]:
        def total(bank: Any) -> tuple[jax.Array, jax.Array]:
            losses = jlora.bank.vmap(lambda params, *texts: loss(None, params, *texts))(params, bank, *texts)
            return losses.sum(), losses

        gradients, losses = jax.grad(total, has_aux=True)(bank)
        updates, state = optimiser.update(gradients, state, bank)
        return optax.apply_updates(bank, updates), state, losses

    begin = time.perf_counter()
    streams = {seed: training.stream(train, BATCH, seed) for seed in {run.seed for run in runs}}
    losses = []
    for _ in _measure.progress(range(steps), runs[0].targets):
        rows = {seed: next(stream) for seed, stream in streams.items()}
        length = max(length for _, length in rows.values())
        texts = [training.cut(train, rows[run.seed][0], length) for run in runs]
        bank, state, values = step(bank, state, job.params, Split(*map(np.stack, zip(*texts, strict=True))))
        losses.append(values)
    mapped = jlora.bank.vmap(job.classify, in_axes=None)
    logits = training.predict(
        jax.jit(lambda bank, params, *texts: jnp.moveaxis(mapped(params, bank, *texts), 0, 1)), bank, job.params, test
    )
    seconds = time.perf_counter() - begin
    return [
        asdict(run)
        | {
            "accuracy": training.accuracy(logits[:, k], test.labels),
            "loss": float(np.mean(losses[-20:], axis=0)[k]),
            "parameters": sum(u.factors[f].size for p, u in adapter.items() if "head" not in p for f in u.factors),
            "bank_seconds": seconds,
            "logits": logits[:, k],
        }
        for k, (run, adapter) in enumerate(zip(runs, adapters.values(), strict=True))
    ]


def train_alone(job: Job, run: Run, steps: int) -> np.ndarray:
    """The test logits (sentences, classes) of a run that is trained without a bank."""
    (train,), (test,) = job.train.values(), job.test.values()

    def logits(adapter: Any, params: Any, *texts: Any) -> jax.Array:
        return jlora.adapt(job.classify)(params, adapter, *texts)

    adapter, _ = training.fit(
        logits,
        new_adapter(job, trace(job), run),
        job.params,
        train,
        None,
        name="alone",
        learning_rate=LEARNING_RATE,
        steps=steps,
        batch=BATCH,
        seed=run.seed,
    )
    return training.predict(jax.jit(logits), adapter, job.params, test)


def compare(job: Job, run: Run, measured: dict[str, Any], steps: int) -> dict[str, Any]:
    """A member of a bank against the same run alone."""
    logits, (test,) = train_alone(job, run, steps), job.test.values()
    return asdict(run) | {
        "accuracy": training.accuracy(logits, test.labels),
        "in the bank": measured["accuracy"],
        "difference of logits": float(np.abs(logits - measured["logits"]).max()),
    }


def train_missing(job: Any, runs: Sequence[Run], result: dict[str, Any], out: Path) -> None:
    """Trains the banks that the result lacks, each followed by a saved file; with the first one run alone.

    Arguments:
        job: a call that makes the job.
        runs: of the whole table.
        result: with "settings" and "runs", to which this adds.
        out: the file.
    """
    done = {Run(row["targets"], row["rank"], row["seed"]) for row in result["runs"]}
    for _, group in itertools.groupby((run for run in runs if run not in done), lambda run: run.targets):
        bank = list(group)
        rows = train_bank(job(), bank, result["settings"]["steps"])
        if "alone" not in result:
            run, row = bank[len(bank) // 2], rows[len(bank) // 2]
            result["alone"] = compare(job(), run, row, result["settings"]["steps"])
        result["runs"] += [{key: value for key, value in row.items() if key != "logits"} for row in rows]
        result["environment"] = _measure.environment()
        _measure.save(out, result)


def arguments() -> argparse.Namespace:
    """The options."""
    parser = _measure.parser(__doc__, _ranks_report.RESULT.name)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="rows (default: all)")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, help="columns (default: 1 2 4 8 64)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=64, help=f"of {BATCH} sentences (default: 64)")
    parser.add_argument("--test", type=int, default=750, help="test sentences (default: 750)")
    return parser.parse_args()


def main() -> None:
    """Trains what is missing, prints and saves."""
    options = arguments()
    settings = {
        "steps": options.steps,
        "batch": BATCH,
        "test": options.test,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
    }
    result = json.loads(options.out.read_text()) if options.out.exists() else {"settings": settings, "runs": []}
    if result["settings"] != settings:
        raise SystemExit(f"{options.out} holds runs of {result['settings']}, not {settings}: give another --out")
    runs = [Run(*cell) for cell in itertools.product(options.targets, options.ranks, options.seeds)]
    train_missing(functools.cache(lambda: load(options.test)), runs, result, options.out)
    for row in result["runs"]:
        print(row)
    print(result.get("alone"))


if __name__ == "__main__":
    main()
