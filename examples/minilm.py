"""The MiniLM-L6 sentence encoder as a plain Flax Linen model: 6 layers of BERT, width 384, 22.6M parameters.

The model knows nothing of adapters.

    model, variables = minilm.load(assets.minilm())
    embeddings = model.apply(variables, ids, mask)          # (batch, 384)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file


class Attention(nn.Module):
    """Self-attention over the positions that the mask selects."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        per_head = (self.heads, width // self.heads)
        query = nn.DenseGeneral(per_head, name="query")(x)
        key = nn.DenseGeneral(per_head, name="key")(x)
        value = nn.DenseGeneral(per_head, name="value")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(per_head[1]).astype(x.dtype)
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(x.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return nn.DenseGeneral(width, axis=(-2, -1), name="out")(mixed)


class FeedForward(nn.Module):
    """The MLP of a layer."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="down")(h)


class Layer(nn.Module):
    """Attention and MLP, each followed by a residual sum and a norm, as in BERT."""

    heads: int
    hidden: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + Attention(self.heads, name="attention")(x, mask)
        x = nn.LayerNorm(self.epsilon, use_fast_variance=False, name="attention_norm")(x)
        x = x + FeedForward(self.hidden, name="feed_forward")(x)
        return nn.LayerNorm(self.epsilon, use_fast_variance=False, name="feed_forward_norm")(x)


class MiniLM(nn.Module):
    """Maps token ids and mask, each `(batch, length)`, to the mean of the last hidden states, `(batch, width)`.

    With `keep`, a policy of `jax.checkpoint`, layers are rematerialised, except for the values that the policy saves.
    """

    vocabulary: int
    positions: int
    types: int
    width: int
    layers: int
    heads: int
    hidden: int
    epsilon: float
    keep: Callable[..., bool] | None = None

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        mask = mask.astype(bool)
        x = nn.Embed(self.vocabulary, self.width, name="word_embedding")(ids)
        x = x + nn.Embed(self.positions, self.width, name="position_embedding")(jnp.arange(ids.shape[1])[None])
        x = x + nn.Embed(self.types, self.width, name="type_embedding")(jnp.zeros_like(ids))
        x = nn.LayerNorm(self.epsilon, use_fast_variance=False, name="embedding_norm")(x)
        layer = Layer if self.keep is None else nn.remat(Layer, policy=self.keep)
        for i in range(self.layers):
            x = layer(self.heads, self.hidden, self.epsilon, name=f"layer_{i}")(x, mask)
        weights = mask.astype(x.dtype)[..., None]
        return (x * weights).sum(axis=1) / weights.sum(axis=1)


class Upper(nn.Module):
    """The layers of the encoder from `first` on, with their names in the encoder, and the mean of their outputs."""

    encoder: MiniLM
    first: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        encoder = self.encoder
        for i in range(self.first, encoder.layers):
            x = Layer(encoder.heads, encoder.hidden, encoder.epsilon, name=f"layer_{i}")(x, mask > 0)
        weights = mask.astype(x.dtype)[..., None]
        return (x * weights).sum(axis=1) / weights.sum(axis=1)


def lower(encoder: MiniLM, first: int) -> Callable[..., Any]:
    """What `Upper` takes, as a jitted function (variables, ids, mask) -> states (batch, length, width)."""
    last = f"layer_{first - 1}"

    @jax.jit
    def states(variables: Any, ids: jax.Array, mask: jax.Array) -> Any:
        _, state = encoder.apply(variables, ids, mask, capture_intermediates=lambda module, _: module.name == last)
        return state["intermediates"][last]["__call__"][0]

    return states


def load(folder: Path) -> tuple[MiniLM, dict[str, Any]]:
    """The model that `config.json` describes, and its variables from `model.safetensors`."""
    config = json.loads((folder / "config.json").read_text())
    model = MiniLM(
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        epsilon=config["layer_norm_eps"],
    )
    tensors = load_file(folder / "model.safetensors")

    def norm(name: str) -> dict[str, jax.Array]:
        return {"scale": jnp.asarray(tensors[f"{name}.weight"]), "bias": jnp.asarray(tensors[f"{name}.bias"])}

    def dense(name: str, kernel: tuple[int, ...], bias: tuple[int, ...]) -> dict[str, jax.Array]:
        # The file holds (out, in); Linen expects (in, out) with a separate axis for the heads.
        weight = tensors[f"{name}.weight"].T.reshape(kernel)
        return {"kernel": jnp.asarray(weight), "bias": jnp.asarray(tensors[f"{name}.bias"].reshape(bias))}

    def embedding(name: str) -> dict[str, jax.Array]:
        return {"embedding": jnp.asarray(tensors[f"embeddings.{name}_embeddings.weight"])}

    d, h, k, f = model.width, model.heads, model.width // model.heads, model.hidden
    params: dict[str, Any] = {
        "word_embedding": embedding("word"),
        "position_embedding": embedding("position"),
        "type_embedding": embedding("token_type"),
        "embedding_norm": norm("embeddings.LayerNorm"),
    }
    for i in range(model.layers):
        layer = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            "attention": {
                **{n: dense(f"{layer}.attention.self.{n}", (d, h, k), (h, k)) for n in ("query", "key", "value")},
                "out": dense(f"{layer}.attention.output.dense", (h, k, d), (d,)),
            },
            "attention_norm": norm(f"{layer}.attention.output.LayerNorm"),
            "feed_forward": {
                "up": dense(f"{layer}.intermediate.dense", (d, f), (f,)),
                "down": dense(f"{layer}.output.dense", (f, d), (d,)),
            },
            "feed_forward_norm": norm(f"{layer}.output.LayerNorm"),
        }
    return model, {"params": params}
