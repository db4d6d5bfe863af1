"""A server that decodes rows of a batch with different adapters, and replaces rows that have finished.

A server has a fixed number of rows. Each step feeds every row one token of its prompt or of its reply; a row that has
finished takes the next request (continuous batching). One compiled program serves all of it.

    server = pooled(bank_step(forward), params, pool, smollm.empty_cache(config, rows, positions))
    for reply in serve(server, [Request("films", prompt, 24), ...], rows):
        print(reply.tokens)
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
import smollm


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by `count` tokens with the adapter `name`; None is the base."""

    name: str | None
    prompt: tuple[int, ...]
    count: int


@dataclass
class Reply:
    """The reply to a request, with the seconds from its start to each of its tokens."""

    request: Request
    started: float
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    position: int = 0  # of the token that the row is fed next

    @property
    def feed(self) -> int:
        """The token that the row is fed next."""
        prompt = self.request.prompt
        return prompt[self.position] if self.position < len(prompt) else self.tokens[-1]

    def advance(self, token: int) -> bool:
        """Takes the model's choice, which counts once the prompt is read; returns whether the reply is done."""
        self.position += 1
        if self.position >= len(self.request.prompt):
            self.tokens.append(token)
            self.seconds.append(time.perf_counter() - self.started)
        return len(self.tokens) == self.request.count


@dataclass(frozen=True)
class Server:
    """What decodes one token for every row.

    Arguments:
        step: `(adapters, ids, tokens, cache, positions) -> (tokens, cache)`.
        use: gives the adapters and the ids for the names of all rows, as `jlora.bank.Pool.use`.
        cache: makes an empty cache.
    """

    step: Callable[..., tuple[jax.Array, Any]]
    use: Callable[[Sequence[str | None]], contextlib.AbstractContextManager[tuple[Any, Any]]]
    cache: Callable[[], Any]


def greedy(forward: smollm.Forward) -> Callable[..., tuple[jax.Array, Any]]:
    """One step of greedy decoding: `(params, tokens, cache, positions) -> (tokens, cache)`, of rows at one position."""

    def step(params: Any, tokens: jax.Array, cache: Any, positions: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = forward(params, tokens[:, None], cache, positions[0])
        return logits[:, -1].argmax(-1).astype(tokens.dtype), cache

    return step


def bank_step(forward: smollm.Forward) -> Callable[..., tuple[jax.Array, Any]]:
    """The compiled step of a bank: `(params, bank, ids, tokens, cache, positions) -> (tokens, cache)`.

    Every row has an adapter and a position of its own.
    """
    return jax.jit(jlora.bank.apply(greedy(forward), in_axes=(0, 1, 0), out_axes=(0, 1)), donate_argnums=4)


def pooled(step: Callable[..., tuple[jax.Array, Any]], params: Any, pool: jlora.bank.Pool, cache: Any) -> Server:
    """A server whose rows use the adapters of a pool, by a step from `bank_step`."""
    return Server(lambda *args: step(params, *args), pool.use, lambda: jax.tree.map(jnp.copy, cache))


def single(forward: smollm.Forward, params: Any, adapter: Any, cache: Any) -> Server:
    """A server of one adapter without a bank. Its cache has an axis of one after the rows, which are mapped."""
    mapped = jax.vmap(jlora.adapt(greedy(forward)), (None, None, 0, 1, 0), (0, 1))

    def step(params: Any, adapter: Any, ids: Any, tokens: Any, cache: Any, positions: Any) -> tuple[jax.Array, Any]:
        tokens, cache = mapped(params, adapter, tokens[:, None], cache, positions[:, None])
        return tokens[:, 0], cache

    compiled = jax.jit(step, donate_argnums=4)
    return Server(
        lambda *args: compiled(params, *args),
        lambda names: contextlib.nullcontext((adapter, None)),
        lambda: jax.tree.map(lambda a: a[:, :, None], cache),
    )


def serve(server: Server, requests: Iterable[Request], rows: int) -> Iterator[Reply]:
    """Serves requests in order, `rows` at a time, and yields each reply when it is done."""
    queue, cache = deque(requests), server.cache()
    active: list[Reply | None] = [None] * rows
    while queue or any(active):
        for row, reply in enumerate(active):
            if reply is None and queue:
                active[row] = Reply(queue.popleft(), time.perf_counter())
        tokens = np.array([reply.feed if reply else 0 for reply in active], np.int32)
        positions = np.array([reply.position if reply else 0 for reply in active], np.int32)
        with server.use([reply.request.name if reply else None for reply in active]) as (adapters, ids):
            tokens, cache = server.step(adapters, ids, tokens, cache, positions)
        for row, token in enumerate(np.asarray(tokens).tolist()):
            reply = active[row]
            if reply and reply.advance(token):
                active[row] = None
                yield reply
