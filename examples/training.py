"""The training loop of the examples, for any trainable tree, any frozen tree, and a function from both to logits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jlora
from reviews import LENGTH, Array, Split

# (trainable, frozen, ids, mask) -> logits (batch, classes)
Logits = Callable[[Any, Any, Any, Any], jax.Array]


@dataclass
class History:
    """The loss of every step, (step, validation accuracy) of every epoch, and the time and tokens of training alone."""

    losses: list[float] = field(default_factory=list)
    validated: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def fit(
    logits: Logits,
    trainable: Any,
    frozen: Any,
    train: Split,
    validation: Split | None,
    *,
    name: str,
    learning_rate: float,
    steps: int,
    batch: int = 32,
    seed: int = 0,
) -> tuple[Any, History]:
    """Trains for `steps` steps with AdamW, warm-up and cosine decay; returns the trained tree and its history."""
    optimiser = adamw(learning_rate, steps)
    loss = mean_loss(logits)
    state = jax.jit(optimiser.init)(trainable)

    # The frozen tree is an argument. Closed over, it would become a constant, which XLA folds for minutes and stores
    # twice.
    @jax.jit
    def step(trainable: Any, state: Any, frozen: Any, ids: Any, mask: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(trainable, frozen, ids, mask, labels)
        updates, state = optimiser.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    evaluate = jax.jit(logits)
    history = History()
    per_epoch = len(train.labels) // batch
    rows = stream(train, batch, seed)
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tqdm(total=steps, desc=name, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for count in range(1, steps + 1):
            part = cut(train, *next(rows))
            started = time.perf_counter()
            trainable, state, value = step(trainable, state, frozen, *part)
            history.losses.append(float(value))
            history.seconds += time.perf_counter() - started
            history.tokens += int(part.mask.sum())
            bar.set_postfix_str(
                f"loss {np.mean(history.losses[-10:]):.3f}, {history.tokens / history.seconds:,.0f} tokens/s",
                refresh=False,
            )
            bar.update()
            if validation and (count % per_epoch == 0 or count == steps):
                logit_values = predict(evaluate, trainable, frozen, validation)
                history.validated.append((count, accuracy(logit_values, validation.labels)))
    return trainable, history


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with gradient clipping, warm-up and cosine decay, for every leaf except the frozen arrays of an adapter."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), max(2, steps))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(schedule), trains))


def mean_loss(logits: Logits) -> Callable[..., jax.Array]:
    """The mean cross entropy of a batch, (trainable, frozen, ids, mask, labels) -> ()."""

    def loss(trainable: Any, frozen: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        predicted = logits(trainable, frozen, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(predicted, labels).mean()

    return loss


def trains(tree: Any) -> Any:
    """A mask for optax: True for every leaf except the frozen arrays of an adapter."""
    return jax.tree.map(
        lambda node: jlora.mask(node) if isinstance(node, jlora.Update) else True,
        tree,
        is_leaf=lambda node: isinstance(node, jlora.Update),
    )


def predict(logits: Logits, trainable: Any, frozen: Any, split: Split, batch: int = 100) -> np.ndarray:
    """The values of `logits` (a jitted function) for every sentence, in the order of `split`.

    Batches hold sentences of similar length, which saves padding.
    """
    order = np.argsort(split.mask.sum(axis=1), kind="stable")
    parts = [cut(split, *_with_length(split, order[start : start + batch])) for start in range(0, len(order), batch)]
    values = np.concatenate([np.asarray(logits(trainable, frozen, part.ids, part.mask)) for part in parts])
    return values[np.argsort(order)]


def accuracy(logits: np.ndarray, labels: Array) -> float:
    """The share of sentences whose largest logit is that of their label."""
    return float((logits.argmax(axis=-1) == labels).mean())


# The rows of a batch, and the number of tokens to which they are truncated.
Rows = tuple[np.ndarray, int]


def stream(split: Split, batch: int, seed: int) -> Iterator[Rows]:
    """Endless batches of sentences of similar length, which halves the padding; each epoch has another order.

    The seed determines all batches: batch n is the same in every run.
    """
    if not 0 < batch <= len(split.labels):
        raise ValueError(f"The batch size must be from 1 to {len(split.labels)}, the number of sentences, not {batch}.")
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.permutation(len(split.labels))[: len(split.labels) // batch * batch]
        # With noise, each epoch groups other sentences.
        lengths = split.mask[chosen].sum(axis=1) + rng.uniform(0, 8, len(chosen))
        groups = chosen[np.argsort(lengths)].reshape(-1, batch)
        for group in rng.permutation(groups):
            yield _with_length(split, group)


def _with_length(split: Split, rows: np.ndarray) -> Rows:
    """The rows with their greatest length, rounded up to 16 tokens: each length is compiled once."""
    longest = int(split.mask[rows].sum(axis=1).max())
    return rows, min(-(-longest // 16) * 16, LENGTH)


def cut(split: Split, rows: np.ndarray, length: int) -> Split:
    """Some rows of a split, truncated to a length."""
    return Split(split.ids[rows, :length], split.mask[rows, :length], split.labels[rows])


def fit_head(features: np.ndarray, labels: Array, head: Any, steps: int = 400) -> Any:
    """Trains a head on precomputed features: full-batch Adam, all steps in one compiled loop."""
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(head: Any, features: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply_head(head, features), labels).mean()

    @jax.jit
    def run(head: Any, features: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            head, state = carry
            updates, state = optimiser.update(jax.grad(loss)(head, features, labels), state, head)
            return (optax.apply_updates(head, updates), state), None

        return jax.lax.scan(step, (head, optimiser.init(head)), length=steps)[0][0]

    return run(head, jnp.asarray(features), jnp.asarray(labels))


def init_head(key: jax.Array, width: int, classes: int) -> dict[str, jax.Array]:
    """A linear classifier, kernel `(width, classes)` and bias."""
    return {"kernel": 0.02 * jax.random.normal(key, (width, classes)), "bias": jnp.zeros(classes)}


def apply_head(head: dict[str, jax.Array], features: Any) -> jax.Array:
    """The logits `(batch, classes)` of features `(batch, width)`."""
    return features @ head["kernel"] + head["bias"]
