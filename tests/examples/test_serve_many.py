"""The server of the examples: every reply is what its adapter writes alone, whatever shares its batch and its slot."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

import jlora
import serve_many
import server
import smollm

SMALL = smollm.Config(vocabulary=31, width=12, hidden=20, layers=2, heads=2, groups=1, epsilon=1e-5, rotary_base=100.0)


def test_every_reply_is_that_of_its_adapter_alone() -> None:
    """Seven requests of different lengths for five adapters and the base, on two rows and two slots."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: smollm.SmolLM(SMALL, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape, np.float32), shapes)
    forward = smollm.forward(graph)
    like = serve_many.initial_adapter(forward, params, SMALL, rank=2)
    adapters = {str(k): jax.tree.map(lambda a: 20 * a, serve_many.stand_in(like, str(k))) for k in range(5)}
    pool = jlora.bank.Pool(like, 2, source=adapters)
    names, counts, prompts = ("0", "3", "0", None, "4", "1", "2"), (3, 2, 4, 4, 1, 4, 4), ((1, 2, 3), (4, 5, 6))
    requests = [
        server.Request(name, prompts[k % 2], count) for k, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    logits = jax.jit(lambda *args: jlora.adapt(forward)(*args)[0][0])
    nothing, positions = jax.tree.map(np.zeros_like, like), 8
    cache = smollm.empty_cache(SMALL, 2, positions)
    served = server.serve(server.pooled(server.bank_step(forward), params, pool, cache), requests, rows=2)
    replies = {requests.index(reply.request): reply.tokens for reply in served}
    assert sorted(replies) == list(range(len(requests)))
    for k, request in enumerate(requests):
        adapter, tokens = adapters.get(str(request.name), nothing), [*request.prompt, *replies[k]]
        padded = np.array([tokens + [0] * (positions - len(tokens))])
        chosen = np.asarray(logits(params, adapter, padded)).argmax(-1).tolist()
        assert len(replies[k]) == request.count
        assert replies[k] == chosen[len(request.prompt) - 1 : len(tokens) - 1]
    assert len({tuple(tokens) for tokens in replies.values()}) > 4  # adapters differ in what they write


def test_names_are_skewed_and_stand_ins_depend_on_the_name_alone() -> None:
    names = serve_many.skewed_names(np.random.default_rng(0), 50, 1000)
    assert set(names) <= set(map(str, range(50)))
    assert names.count("0") > 2 * names.count("1") > 2 * names.count("7")
    like: Any = {"w": np.zeros((2, 3), np.float32)}
    first, again, other = (jax.tree.leaves(serve_many.stand_in(like, name))[0] for name in ("1", "1", "2"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
