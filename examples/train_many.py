"""Trains adapters for four genres of text as one program over one encoder, and serves them in one mixed batch.

python examples/train_many.py                           # four adapters of MiniLM, one program
python examples/train_many.py --alone --seeds 0 1 2     # also trains each by itself, for comparison
python examples/train_many.py --tiny --alone            # a small random model and random texts; no download

Film reviews, editorials, tweets and product reviews: does a sentence speak well or ill of something? An adapter is LoRA
on the encoder and a classification head (`jlora.Full`), so that a bank holds all that differs between the genres. The
upper half of the encoder is trained; the outputs of the lower half are computed once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import assets
import jlora
import many_report
import minilm
import report
import reviews
import training
from finetune_reviews import TARGETS, unused
from reviews import Split

FILES = {
    "film reviews": "movieReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "product reviews": "amazonReviewSnippets_GroundTruth.txt",
}
TRAIN, TEST, LENGTH = 1600, 500, 32  # sentences of each genre, tokens of a sentence


@dataclass(frozen=True)
class Job:
    """One model, and the texts of every genre.

    Arguments:
        params: the encoder's upper half and a head; both are frozen, and every adapter changes both.
        embed: (encoder, states, mask) -> (batch, width).
        train, test: the texts by genre; their `ids` are the hidden states (n, length, width) of the lower half.
    """

    params: dict[str, Any]
    embed: Callable[..., Any]
    train: dict[str, Split]
    test: dict[str, Split]

    def classify(self, params: dict[str, Any], states: Any, mask: Any) -> jax.Array:
        """The logits (batch, classes): the function that is adapted."""
        return training.apply_head(params["head"], self.embed(params["encoder"], states, mask))

    def members(self, seed: int, rank: int) -> dict[str, jlora.Adapter]:
        """A new adapter for every genre."""
        texts = next(iter(self.train.values()))
        sites = jlora.trace(self.classify, self.params, texts.ids[:1], texts.mask[:1])
        targets = {"head/.*": jlora.Full(), f"encoder/{TARGETS}": jlora.LoRA(rank, alpha=2.0 * rank)}
        keys = jax.random.split(jax.random.key(seed), len(self.train))
        return {genre: jlora.init(key, sites, targets) for genre, key in zip(self.train, keys, strict=True)}


def load() -> Job:
    """MiniLM and the sentences of the four genres; the split does not depend on the seed of a run."""
    folder, sentences = assets.minilm(), assets.genres()
    texts = {genre: read(sentences / file, folder / "tokenizer.json") for genre, file in FILES.items()}
    return prepare(*minilm.load(folder), texts, TRAIN)


def read(path: Path, tokenizer: Path) -> Split:
    """The sentences of one genre in random order, none of them twice."""
    sentences, labels = reviews.read(path)
    sentences, rows = np.unique(sentences, return_index=True)
    order = np.random.default_rng(0).permutation(len(rows))[: TRAIN + TEST]
    return Split(*reviews.encode(tokenizer, sentences[order].tolist(), LENGTH), labels[rows[order]])


def tiny() -> Job:
    """A small random encoder, and random texts: in each genre another bit of all tokens is the label."""
    model = minilm.MiniLM(vocabulary=16, positions=16, types=2, width=16, layers=2, heads=4, hidden=32, epsilon=1e-12)
    rng = np.random.default_rng(0)
    texts = {}
    for bit, genre in enumerate(FILES):
        ids = rng.integers(0, 16, (96, 16)).astype(np.int32)
        mask = (np.arange(16) < rng.integers(4, 9, 96)[:, None]).astype(np.int32)
        labels = rng.integers(0, 2, 96).astype(np.int32)
        texts[genre] = Split(ids & ~(1 << bit) | labels[:, None] << bit, mask, labels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *texts["tweets"][:2])
    variables = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), shapes)
    return prepare(model, variables, texts, 64)


def prepare(model: minilm.MiniLM, variables: Any, texts: dict[str, Split], count: int) -> Job:
    """The upper half of an encoder, and the lower half's states for the texts; the first `count` are to train on."""
    first = model.layers // 2
    upper, lower = minilm.Upper(model, first), minilm.lower(model, first)
    encoder = {"params": {f"layer_{i}": variables["params"][f"layer_{i}"] for i in range(first, model.layers)}}
    params = {"encoder": encoder, "head": training.init_head(jax.random.key(0), model.width, classes=2)}
    train, test = {}, {}
    for genre, (ids, mask, labels) in tqdm(texts.items(), "lower half"):
        parts = [slice(start, start + 100) for start in range(0, len(ids), 100)]
        states = np.concatenate([np.asarray(lower(variables, ids[part], mask[part])) for part in parts])
        train[genre] = Split(states[:count], mask[:count], labels[:count])
        test[genre] = Split(states[count:], mask[count:], labels[count:])
    return Job(params, upper.apply, train, test)


def train_together(job: Job, bank: jlora.bank.Bank, options: argparse.Namespace, seed: int) -> jlora.bank.Bank:
    """Trains every member on the stream of its genre, all in one program."""
    steps = options.steps

    def member_optimiser(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(training.adamw(1.0, steps), optax.scale(learning_rate))

    optimiser = jlora.bank.optimiser(member_optimiser, learning_rate=_rates(job, options))
    state = optimiser.init(cast(Any, bank))

    def loss(params: Any, states: Any, mask: Any, labels: Any) -> jax.Array:
        logits = job.classify(params, states, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(bank: Any, state: Any, params: Any, texts: Split) -> tuple[Any, Any, jax.Array]:
        def total(bank: Any) -> tuple[jax.Array, jax.Array]:
            losses = jlora.bank.vmap(loss)(params, bank, *texts)  # one for each genre
            return losses.sum(), losses

        gradients, losses = jax.grad(total, has_aux=True)(bank)
        updates, state = optimiser.update(gradients, state, bank)
        return optax.apply_updates(bank, updates), state, losses

    streams = {genre: training.stream(texts, options.batch, seed) for genre, texts in job.train.items()}
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tqdm(total=steps, desc=f"together, seed {seed}", unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for _ in range(steps):
            rows = {genre: next(stream) for genre, stream in streams.items()}
            length = max(length for _, length in rows.values())
            texts = [training.cut(job.train[genre], chosen, length) for genre, (chosen, _) in rows.items()]
            bank, state, losses = step(bank, state, job.params, Split(*map(np.stack, zip(*texts, strict=True))))
            bar.set_postfix_str("losses " + " ".join(f"{value:.3f}" for value in np.asarray(losses)), refresh=False)
            bar.update()
    return bank


def train_alone(job: Job, genre: str, adapter: jlora.Adapter, options: argparse.Namespace, seed: int) -> jlora.Adapter:
    """Trains one adapter by the loop of the other examples, without a bank."""
    trained, _ = training.fit(
        lambda adapter, params, *texts: jlora.adapt(job.classify)(params, adapter, *texts),
        adapter,
        job.params,
        job.train[genre],
        None,
        name=f"{genre} alone, seed {seed}",
        learning_rate=float(_rates(job, options)[list(job.train).index(genre)]),
        steps=options.steps,
        batch=options.batch,
        seed=seed,
    )
    return trained


def _rates(job: Job, options: argparse.Namespace) -> np.ndarray:
    return np.broadcast_to(np.asarray(options.lr, np.float32), (len(job.train),))


def every_pair(job: Job, bank: jlora.bank.Bank) -> dict[str, np.ndarray]:
    """The logits (texts, members, classes) of every member on the test texts of every genre."""
    mapped = jlora.bank.vmap(job.classify, in_axes=None)  # all members get the same texts
    logits = jax.jit(lambda bank, params, *texts: jnp.moveaxis(mapped(params, bank, *texts), 0, 1))
    return {genre: training.predict(logits, bank, job.params, texts) for genre, texts in job.test.items()}


def mixed_batches(job: Job, bank: jlora.bank.Bank, batch: int = 100) -> dict[str, np.ndarray]:
    """The logits (texts, classes) of the test texts by genre, computed in batches that mix all genres."""
    apply = jax.jit(jlora.bank.apply(job.classify))
    texts = Split(*map(np.concatenate, zip(*job.test.values(), strict=True)))
    ids = bank.ids([genre for genre, texts in job.test.items() for _ in texts.labels])
    order = np.random.default_rng(0).permutation(len(ids))
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    shuffled = np.concatenate([apply(job.params, bank, ids[p], texts.ids[p], texts.mask[p]) for p in parts])
    logits = shuffled[np.argsort(order)]
    return {genre: logits[ids == bank.position(genre)] for genre in job.test}


def frozen_accuracies(job: Job) -> dict[str, float]:
    """The test accuracy of a head on the frozen encoder, by genre."""
    embed = jax.jit(lambda _, encoder, states, mask: job.embed(encoder, states, mask))
    accuracies = {}
    for genre, texts in job.train.items():
        features, test = (training.predict(embed, None, job.params["encoder"], t) for t in (texts, job.test[genre]))
        head = training.fit_head(features, texts.labels, job.params["head"])
        accuracies[genre] = training.accuracy(np.asarray(training.apply_head(head, test)), job.test[genre].labels)
    return accuracies


def saved(bank: jlora.bank.Bank, folder: Path) -> jlora.bank.Bank:
    """The bank as read back from a folder; what is evaluated is what was saved."""
    jlora.bank.save(folder, bank)
    loaded = jlora.bank.load(folder)
    if not jax.tree.all(jax.tree.map(np.array_equal, bank, loaded)):
        raise RuntimeError(f"{folder} does not hold the bank that was saved")
    return loaded


def run(job: Job, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed: accuracies on the test texts, by genre, and of every adapter on every genre."""
    members = job.members(seed, options.rank)
    bank = train_together(job, jlora.bank.stack(members), options, seed)
    bank = saved(bank, options.out / f"bank-{seed}")
    pairs = every_pair(job, bank)
    logits = {genre: {"together": pairs[genre][:, bank.position(genre)]} for genre in bank}
    for genre, mixed in mixed_batches(job, bank).items():
        logits[genre]["mixed batch"] = mixed
    if options.alone:
        adapted = jax.jit(lambda adapter, params, *texts: jlora.adapt(job.classify)(params, adapter, *texts))
        for genre, member in members.items():
            trained = train_alone(job, genre, member, options, seed)
            logits[genre]["alone"] = training.predict(adapted, trained, job.params, job.test[genre])
    return {
        "genres": {genre: many_report.compare(ways, job.test[genre].labels) for genre, ways in logits.items()},
        "pairs": [
            [training.accuracy(pairs[texts][:, bank.position(adapter)], job.test[texts].labels) for texts in bank]
            for adapter in bank
        ],
    }


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of one batch a genre (default: 100, one epoch)")
    parser.add_argument("--batch", type=int, default=16, help="sentences of a genre in a step (default: 16)")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA factors; the scale is always 2 (default: 8)")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[2e-3], help="peak learning rate: one, or one a genre (default: 2e-3)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of adapters and data order (default: 0)")
    parser.add_argument("--alone", action="store_true", help="also train each adapter by itself, for comparison")
    parser.add_argument("--tiny", action="store_true", help="a small random model and random texts; no download")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="(default: the first unused of runs/many, runs/many-2, ...)"
    )
    options = parser.parse_args(args)
    if len(options.lr) not in (1, len(FILES)):
        parser.error(f"--lr takes one rate, or {len(FILES)}: {', '.join(FILES)}")
    options.out = options.out or unused("runs/many")
    return options


def main() -> int:
    """Trains and evaluates every seed, and writes the table and the picture."""
    options = arguments()
    try:
        job = tiny() if options.tiny else load()
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())  # genres and seeds share compiled programs
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "test texts": len(next(iter(job.test.values())).labels),
        "frozen encoder": frozen_accuracies(job),
        "environment": report.environment(),
        "runs": {},
    }
    for seed in options.seeds:
        result["runs"][str(seed)] = run(job, options, seed)
        (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(many_report.write(options.out, result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
