"""Film-review sentences as conversations: a critic is asked to praise or to pan a film, and replies with a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

import smollm

SYSTEM = "You are a film critic."
LENGTH = 64  # tokens; longer conversations are left out (about one in thirty)


class Replies(NamedTuple):
    """Conversations `ids` (n, length) int32, and the mask `written` (n, length) int32 of the tokens to be learned."""

    ids: np.ndarray
    written: np.ndarray


def prompt(liked: bool) -> str:
    """The conversation up to the reply."""
    return smollm.chat(f"{'Praise' if liked else 'Pan'} a film in one sentence.", SYSTEM)


def encode(tokenizer: Tokenizer, sentences: Sequence[str], labels: Iterable[int]) -> Replies:
    """Prompt, sentence and end token, padded to one length."""
    ids = np.zeros((len(sentences), LENGTH), np.int32)
    written = np.zeros((len(sentences), LENGTH), np.int32)
    count = 0
    for sentence, label in zip(sentences, labels, strict=True):
        prompt_ids = tokenizer.encode(prompt(bool(label))).ids
        all_ids = prompt_ids + tokenizer.encode(sentence.strip() + smollm.END).ids
        if len(all_ids) <= LENGTH:
            ids[count, : len(all_ids)] = all_ids
            written[count, len(prompt_ids) : len(all_ids)] = 1
            count += 1
    return Replies(ids[:count], written[:count])


def batches(replies: Replies, size: int, rng: np.random.Generator) -> Iterator[Replies]:
    """Endless batches; each epoch has another random order."""
    while True:
        order = rng.permutation(len(replies.ids))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield Replies(replies.ids[rows], replies.written[rows])
