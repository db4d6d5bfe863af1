"""Film-review sentences as conversations: a critic is asked to praise or to pan, and answers with one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

import smollm

SYSTEM = "You are a film critic."
LENGTH = 64  # tokens; longer conversations are left out, about one in thirty


class Replies(NamedTuple):
    """Conversations (n, length) int32 as the model reads them, and a mask of the tokens that it has to write."""

    ids: np.ndarray
    written: np.ndarray


def prompt(liked: bool) -> str:
    return smollm.chat(f"{'Praise' if liked else 'Pan'} a film in one sentence.", SYSTEM)


def encode(tokenizer: Tokenizer, sentences: Sequence[str], labels: Sequence[int]) -> Replies:
    """Prompt, sentence and the mark that ends it, padded to one length."""
    ids = np.zeros((len(sentences), LENGTH), np.int32)
    written = np.zeros((len(sentences), LENGTH), np.int32)
    kept = 0
    for sentence, label in zip(sentences, labels, strict=True):
        asked = tokenizer.encode(prompt(bool(label))).ids
        whole = asked + tokenizer.encode(sentence.strip() + smollm.END).ids
        if len(whole) <= LENGTH:
            ids[kept, : len(whole)] = whole
            written[kept, len(asked) : len(whole)] = 1
            kept += 1
    return Replies(ids[:kept], written[:kept])


def batches(replies: Replies, size: int, rng: np.random.Generator) -> Iterator[Replies]:
    """Batches without end, in another random order every time through."""
    while True:
        order = rng.permutation(len(replies.ids))
        for at in range(0, len(order) - size + 1, size):
            rows = order[at : at + size]
            yield Replies(replies.ids[rows], replies.written[rows])
