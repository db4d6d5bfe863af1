"""Film-review sentences with ratings, as two classes: is the sentence for or against the film?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

TEST, VALIDATION, TRAIN = 1500, 500, 3000
LENGTH = 48  # tokens; longer sentences are truncated (about one in twenty)

Array = np.ndarray | jax.Array


class Split(NamedTuple):
    """Encoded sentences: `ids` and `mask` (n, length) int32, `labels` (n,) int32 with 1 for a favourable sentence."""

    ids: Array
    mask: Array
    labels: Array


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Sentences and labels, without the sentences whose rating is nearly neutral."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    rated = [(sentence, float(rating)) for _, rating, sentence in rows]
    clear = [(sentence, rating) for sentence, rating in rated if abs(rating) > 0.5]
    return [sentence for sentence, _ in clear], np.array([rating > 0 for _, rating in clear], np.int32)


def encode(tokenizer: Path, sentences: Sequence[str], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of `sentences`, each `(n, length)`, truncated or padded to one length."""
    tokens = Tokenizer.from_file(str(tokenizer))
    tokens.enable_truncation(length)
    tokens.enable_padding(length=length)
    encoded = tokens.encode_batch(list(sentences))
    ids = np.array([sentence.ids for sentence in encoded], np.int32)
    return ids, np.array([sentence.attention_mask for sentence in encoded], np.int32)


def load(path: Path, tokenizer: Path) -> tuple[Split, Split, Split]:
    """The training, validation and test splits; they do not depend on the seed of a training run."""
    sentences, labels = read(path)
    order = np.random.default_rng(0).permutation(len(sentences))
    ends = np.cumsum([TEST, VALIDATION, TRAIN])
    test, validation, train = np.split(order[: ends[-1]], ends[:-1])

    def split(rows: np.ndarray) -> Split:
        return Split(*encode(tokenizer, [sentences[i] for i in rows]), labels[rows])

    return split(train), split(validation), split(test)
