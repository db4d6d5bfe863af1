"""The runs of sweep.py: the task, and banks of runs that differ in learning rate, seed or rank, each as one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import assets
import jlora
import minilm
import reviews

ALPHA = 32.0
LAYERS = {
    "all": r".*/(attention|feed_forward)/\w+/kernel",
    "attention": r".*/attention/\w+/kernel",
    "MLP": r".*/feed_forward/\w+/kernel",
}
# The task: a head, which is not trained, of the embeddings of two sentences, and short sentences to classify.
TRAINED_LAYERS = 2
CLASSES = ("It was a terrible film.", "It was a great film.")
SHARPNESS = 3.0
LENGTH, TRAIN, HELD_OUT = 16, 768, 400  # tokens; sentences


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Arguments:
        rank: of the LoRA; None trains every weight.
        layers: which kernels have a LoRA, a name in `LAYERS`.
        batch: sentences in a step.
        seed: of A and of the order of the sentences.
        rate: the learning rate.
    """

    rank: int | None
    layers: str
    batch: int
    seed: int
    rate: float


class Task(NamedTuple):
    """What is trained.

    Arguments:
        apply: (params, states, mask) -> logits (batch, classes).
        params: the base parameters of `apply`.
        train, held_out: sentences; their `ids` are hidden states (n, length, width).
    """

    apply: Callable[..., jax.Array]
    params: Any
    train: reviews.Split
    held_out: reviews.Split


def film_reviews() -> Task:
    """The last layers of MiniLM with a frozen head, and short sentences as the layers below have them."""
    folder = assets.minilm()
    encoder, variables = minilm.load(folder)
    first = encoder.layers - TRAINED_LAYERS
    upper, lower = minilm.Upper(encoder, first), minilm.lower(encoder, first)
    params = {"params": {f"layer_{i}": variables["params"][f"layer_{i}"] for i in range(first, encoder.layers)}}

    def encode(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> reviews.Split:
        parts = [slice(start, start + 100) for start in range(0, len(ids), 100)]
        states = [np.asarray(lower(variables, ids[part], mask[part])) for part in parts]
        return on_device(reviews.Split(np.concatenate(states), mask, labels))

    classes = encode(*reviews.encode(folder / "tokenizer.json", CLASSES, LENGTH), np.arange(2))
    head = jax.jit(upper.apply)(params, classes.ids, classes.mask).T  # (width, classes)
    head = SHARPNESS * head / jnp.linalg.norm(head, axis=0)

    sentences, labels = reviews.read(assets.reviews())
    ids, mask = reviews.encode(folder / "tokenizer.json", sentences, LENGTH + 1)
    order = np.random.default_rng(0).permutation(np.flatnonzero(mask[:, LENGTH] == 0))
    train, held_out = order[:TRAIN], order[TRAIN : TRAIN + HELD_OUT]
    splits = (encode(ids[rows, :LENGTH], mask[rows, :LENGTH], labels[rows]) for rows in (train, held_out))
    return Task(lambda *args: upper.apply(*args) @ head, params, *splits)


def on_device(split: reviews.Split) -> reviews.Split:
    """The same sentences as arrays of JAX."""
    return reviews.Split(*map(jnp.asarray, split))


class Trainer:
    """Trains banks of runs on one task. Banks of one size, rank, batch size and kind of layers share one program."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sites = jlora.trace(task.apply, task.params, task.train.ids[:1], task.train.mask[:1])
        tx = jlora.bank.optimiser(optax.adam, learning_rate=0.0)  # the rates are in the state

        def losses(params: Any, states: Any, mask: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
            logits = task.apply(params, states, mask)
            values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return values.mean(), (logits.argmax(-1) == labels).mean()

        @jax.jit
        def step(bank: Any, state: Any, params: Any, train: reviews.Split, rows: jax.Array) -> Any:
            batches = [array[rows] for array in train]  # (members, batch, ...)

            def total(bank: Any) -> tuple[jax.Array, jax.Array]:
                values, _ = jlora.bank.vmap(losses, on_dense="allow")(params, bank, *batches)
                return values.sum(), values

            gradients, values = jax.grad(total, has_aux=True)(bank)
            updates, state = tx.update(gradients, state, bank)
            return optax.apply_updates(bank, updates), state, values

        self.step = step
        self.start = jax.jit(self._start, static_argnums=0)
        self.measure = jax.jit(jlora.bank.vmap(losses, in_axes=None, on_dense="allow"))

    def _start(self, runs: Sequence[Run]) -> tuple[jlora.bank.Bank, Any, list[int]]:
        """The bank of runs, the state of its optimiser, and how many numbers each run trains."""
        adapters = [self._adapter(run) for run in runs]
        bank = jlora.bank.stack({str(k): adapter for k, adapter in enumerate(adapters)})
        rates = jnp.array([run.rate for run in runs])
        sizes = [sum(f.size for update in adapter.values() for f in update.factors.values()) for adapter in adapters]
        return bank, jlora.bank.optimiser(optax.adam, learning_rate=rates).init(cast(Any, bank)), sizes

    def _adapter(self, run: Run) -> jlora.Adapter:
        targets = {".*": jlora.Full()} if run.rank is None else {LAYERS[run.layers]: jlora.LoRA(run.rank, ALPHA)}
        return jlora.init(jax.random.key(run.seed), self.sites, targets)

    def rows(self, run: Run) -> np.ndarray:
        """The sentences of every step, (steps, batch): each sentence once."""
        count = len(self.task.train.labels) // run.batch * run.batch
        return np.random.default_rng(run.seed).permutation(len(self.task.train.labels))[:count].reshape(-1, run.batch)

    def train(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Trains one bank; returns for each run its settings, trained numbers, losses and accuracy."""
        bank, state, sizes = self.start(tuple(runs))
        losses = []
        for rows in np.stack([self.rows(run) for run in runs], axis=1):
            bank, state, values = self.step(bank, state, self.task.params, self.task.train, rows)
            losses.append(values)
        held_out = self.task.held_out
        parts = [reviews.Split(*(a[n : n + 100] for a in held_out)) for n in range(0, len(held_out.labels), 100)]
        measured = [self.measure(self.task.params, bank, *part) for part in parts]
        weights = [len(part.labels) for part in parts]
        loss, accuracy = (np.average(values, axis=0, weights=weights) for values in zip(*measured, strict=True))
        last = np.mean(losses[-max(1, len(losses) // 4) :], axis=0)
        return [
            dataclasses.asdict(run)
            | {
                "parameters": int(sizes[k]),
                "train_loss": round(float(last[k]), 5),
                "loss": round(float(loss[k]), 5),
                "accuracy": round(float(accuracy[k]), 5),
            }
            for k, run in enumerate(runs)
        ]
