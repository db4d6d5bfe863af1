"""A small mixture of experts that classifies texts, in plain JAX: dispatch by `jax.lax.ragged_dot`, or dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


@dataclass(frozen=True)
class MixtureOfExperts:
    """A transformer whose feed-forward layers are experts, of which a router chooses a few for each token.

    Arguments:
        vocabulary, length: the number of tokens, and the largest number in a text.
        width, hidden, layers, heads: as in any transformer; `hidden` is the width of one expert.
        experts, chosen: the experts of a layer, and how many of them a token uses.
        closed: how many experts, the last ones, the router never chooses: a control, because they get no tokens.
        dispatch: "ragged" computes each expert on its own tokens, "dense" each expert on all tokens, and then takes
            what the router chose. Both give the same outputs, from the same parameters.
    """

    vocabulary: int
    length: int = 32
    width: int = 64
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    experts: int = 8
    chosen: int = 2
    closed: int = 1
    dispatch: str = "ragged"

    def init(self, key: jax.Array) -> Params:
        """Random parameters; kernels are (in, out), those of experts (experts, in, out)."""
        keys = iter(jax.random.split(key, 3 + 7 * self.layers))

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape) / math.sqrt(shape[-2])

        def layer() -> Params:
            square, experts = (self.width, self.width), (self.experts,)
            return {
                "attention": {name: normal(*square) for name in ("query", "key", "value", "out")},
                "router": normal(self.width, self.experts),
                "experts": {
                    "up": normal(*experts, self.width, self.hidden),
                    "down": normal(*experts, self.hidden, self.width),
                },
            }

        return {
            "embedding": jax.random.normal(next(keys), (self.vocabulary, self.width)),
            "positions": 0.1 * jax.random.normal(next(keys), (self.length, self.width)),
            "layers": [layer() for _ in range(self.layers)],
            "head": normal(self.width, 2),
        }

    def logits(self, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """The logits (texts, 2) of token ids (texts, length), with a mask that is 0 for padding."""
        x, _ = self._run(params, ids, mask)
        weights = mask[..., None].astype(x.dtype)
        return (_norm(x) * weights).sum(1) / weights.sum(1) @ params["head"]

    def tokens(self, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """How many tokens each expert gets, (layers, experts)."""
        return self._run(params, ids, mask)[1]

    def _run(self, params: Params, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = params["embedding"][ids] + params["positions"][None, : ids.shape[1]]
        tokens = []
        for layer in params["layers"]:
            x = x + self._attend(layer["attention"], _norm(x), mask)
            rows = _norm(x).reshape(-1, self.width)
            weights, experts = self._route(rows @ layer["router"], mask.reshape(-1))
            mix = _ragged if self.dispatch == "ragged" else _dense
            x = x + mix(layer["experts"], rows, weights, experts).reshape(x.shape)
            tokens.append(_count(experts, self.experts))
        return x, jnp.stack(tokens)

    def _attend(self, p: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], self.heads, -1)
        query, key, value = ((x @ p[name]).reshape(heads) for name in ("query", "key", "value"))
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None].astype(bool))
        return attended.reshape(x.shape) @ p["out"]

    def _route(self, scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weight and the number of every chosen expert, (rows, chosen); padding has an expert that is not there."""
        is_open = jnp.arange(self.experts) < self.experts - self.closed
        best, experts = jax.lax.top_k(jnp.where(is_open[None], scores, -jnp.inf), self.chosen)
        return jax.nn.softmax(best), jnp.where(mask[:, None] > 0, experts, self.experts)


def _ragged(p: Params, rows: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
    """Sorts the rows by their experts, so that each expert has a group; the rows of padding are in no group."""
    order = jnp.argsort(experts.reshape(-1), stable=True)
    source, sizes = order // experts.shape[1], _count(experts, len(p["up"]))
    hidden = jax.nn.gelu(jax.lax.ragged_dot(rows[source], p["up"], sizes))
    mixed = jax.lax.ragged_dot(hidden, p["down"], sizes) * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(rows).at[source].add(mixed)


def _dense(p: Params, rows: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
    """Every expert on every row, weighted by what the router chose."""
    gates = (jax.nn.one_hot(experts, len(p["up"])) * weights[..., None]).sum(1)
    hidden = jax.nn.gelu(jnp.einsum("nd,edf->enf", rows, p["up"]))
    return jnp.einsum("end,ne->nd", jnp.einsum("enf,efd->end", hidden, p["down"]), gates)


def _count(experts: jax.Array, total: int) -> jax.Array:
    return (experts.reshape(-1, 1) == jnp.arange(total)[None]).sum(0, dtype=jnp.int32)


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
