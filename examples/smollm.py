"""SmolLM2-135M-Instruct as a plain Flax NNX model: Llama architecture, 30 layers, width 576, 134.5M parameters.

The model knows nothing of adapters. With `quantized` the weights stay in the 4-bit blocks of the file.

    model, tokenizer = smollm.load(assets.smollm())
    logits, _ = model(tokens)                               # (batch, length, vocabulary)
    graph, params = nnx.split(model)
    replies = smollm.generate(smollm.forward(graph), params, prompts, count=32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf import GGUFReader, TokenType, dequantize
from jax import lax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jlora.quantized import GGUF

# Keys and values of every layer, each (layers, batch, positions, key-value heads, head width).
Cache = tuple[jax.Array, jax.Array]
# (params, tokens, cache, start) -> (logits, cache)
Forward = Callable[..., tuple[jax.Array, Cache]]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "<|im_end|>"


@dataclass(frozen=True)
class Config:
    """The sizes of a Llama; `groups` is the number of key-value heads, each shared by `heads // groups` query heads."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    groups: int
    epsilon: float
    rotary_base: float

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.width // self.heads


def linear(width: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer without a bias."""
    return nnx.Linear(width, out, use_bias=False, rngs=rngs)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.config = config
        queries, shared = config.heads * config.head_width, config.groups * config.head_width
        self.query = linear(config.width, queries, rngs)
        self.key = linear(config.width, shared, rngs)
        self.value = linear(config.width, shared, rngs)
        self.out = linear(queries, config.width, rngs)

    def __call__(self, x: jax.Array, cache: Any, start: Any) -> tuple[jax.Array, Any]:
        batch, length, _ = x.shape
        config = self.config
        positions = start + jnp.arange(length)
        query = self.query(x).reshape(batch, length, config.heads, config.head_width)
        key = self.key(x).reshape(batch, length, config.groups, config.head_width)
        value = self.value(x).reshape(batch, length, config.groups, config.head_width)
        query, key = (rotate(part, positions, config.rotary_base) for part in (query, key))
        if cache is not None:
            write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            key, value = cache = (write(cache[0], key), write(cache[1], value))

        query = query.reshape(batch, length, config.groups, -1, config.head_width)
        scores = jnp.einsum("btghd,bsgd->bghts", query, key) / np.sqrt(config.head_width).astype(x.dtype)
        causal = jnp.arange(key.shape[1])[None, :] <= positions[:, None]
        scores = jnp.where(causal[None, None, None], scores, jnp.finfo(x.dtype).min)
        mixed = jnp.einsum("bghts,bsgd->btghd", jax.nn.softmax(scores), value)
        return self.out(mixed.reshape(batch, length, -1)), cache


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates pairs (i, i + width / 2) of x `(batch, length, heads, width)` by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequencies = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None].astype(x.dtype), jnp.sin(angles)[None, :, None].astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class MLP(nnx.Module):
    """The gated MLP (SwiGLU)."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.gate = linear(config.width, config.hidden, rngs)
        self.up = linear(config.width, config.hidden, rngs)
        self.down = linear(config.hidden, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention and MLP, each after a norm and followed by a residual sum."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.norm_1 = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.norm_2 = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, cache: Any, start: Any) -> tuple[jax.Array, Any]:
        mixed, cache = self.attention(self.norm_1(x), cache, start)
        x = x + mixed
        return x + self.mlp(self.norm_2(x)), cache


class SmolLM(nnx.Module):
    """Maps tokens `(batch, length)` to logits `(batch, length, vocabulary)`; the head is tied to the embedding."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.layers = stack(rngs)  # every weight has a first axis for the layers
        self.norm = nnx.RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, tokens: jax.Array, cache: Cache | None = None, start: Any = 0) -> tuple[jax.Array, Any]:
        """With a cache, the tokens have the positions from `start` on, and attend to the cached ones before them."""

        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(layer: Layer, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            return layer(x, cache, start)

        x, cache = run(self.layers, self.embed(tokens), cache)
        return self.embed.attend(self.norm(x)), cache


def forward(graph: nnx.GraphDef[SmolLM]) -> Forward:
    """The model as a function of its parameters, as `jlora.adapt` expects it."""
    return lambda params, *args: nnx.merge(graph, params, copy=True)(*args)


def empty_cache(config: Config, batch: int, positions: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of zeros."""
    shape = (config.layers, batch, positions, config.groups, config.head_width)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def generate(
    forward: Forward,
    params: Any,
    prompts: jax.Array,
    config: Config,
    count: int,
    *,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts `(batch, length)` with `count` tokens `(batch, count)`; temperature 0 is greedy decoding.

    To be jitted as a function of `params`, `prompts` and `key`. `params` is the first argument of `forward`.
    """
    batch, length = prompts.shape
    keys = jax.random.split(jax.random.key(0) if key is None else key, count)

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        if temperature:
            return jax.random.categorical(key, logits / temperature).astype(prompts.dtype)
        return logits.argmax(axis=-1).astype(prompts.dtype)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        token, cache, position = carry
        logits, cache = forward(params, token[:, None], cache, position)
        following = choose(logits[:, -1], key)
        return (following, cache, position + 1), following

    logits, cache = forward(params, prompts, empty_cache(config, batch, length + count), 0)
    first = choose(logits[:, -1], keys[0])
    _, rest = lax.scan(step, (first, cache, length), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def chat(user: str, system: str = SYSTEM) -> str:
    """A conversation in the model's format, up to the start of its reply."""
    return f"<|im_start|>system\n{system}{END}\n<|im_start|>user\n{user}{END}\n<|im_start|>assistant\n"


def load(path: Path, *, quantized: bool = False, dtype: Any = jnp.float32) -> tuple[SmolLM, Tokenizer]:
    """The model and the tokenizer from a GGUF file of Llama's architecture with a tied embedding.

    With `quantized` the matrices stay in the blocks of the file, and the model runs through `jlora.adapt`. `dtype` is
    that of the weights, or of the weights after dequantisation.
    """
    reader = GGUFReader(path)
    config = _config(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def tensor(name: str) -> jax.Array:
        return jnp.asarray(dequantize(tensors[name].data, tensors[name].tensor_type), dtype)

    def table(name: str) -> Any:
        kind = tensors[name].tensor_type.name
        return GGUF(jnp.asarray(tensors[name].data), kind, dtype=jnp.dtype(dtype)) if quantized else tensor(name)

    def kernels(name: str, heads: int = 0) -> Any:
        """The stacked kernels (layers, in, out), from rows (out, in) or from the bytes of such rows."""
        layer_tensors = [tensors[f"blk.{i}.{name}.weight"] for i in range(config.layers)]
        kind = layer_tensors[0].tensor_type
        rows = np.stack([t.data if quantized else dequantize(t.data, kind) for t in layer_tensors])
        if heads:  # in the file the two elements of a rotary pair are adjacent
            layers, _, width = rows.shape
            rows = rows.reshape(layers, heads, -1, 2, width).swapaxes(2, 3).reshape(layers, -1, width)
        if quantized:
            return GGUF(jnp.asarray(rows), kind.name, transposed=True, dtype=jnp.dtype(dtype))
        return jnp.asarray(rows.swapaxes(1, 2), dtype)

    def norms(name: str) -> dict[str, jax.Array]:
        return {"scale": jnp.stack([tensor(f"blk.{i}.{name}.weight") for i in range(config.layers)])}

    values = {
        "embed": {"embedding": table("token_embd.weight")},
        "layers": {
            "norm_1": norms("attn_norm"),
            "attention": {
                "query": {"kernel": kernels("attn_q", config.heads)},
                "key": {"kernel": kernels("attn_k", config.groups)},
                "value": {"kernel": kernels("attn_v")},
                "out": {"kernel": kernels("attn_output")},
            },
            "norm_2": norms("ffn_norm"),
            "mlp": {name: {"kernel": kernels(f"ffn_{name}")} for name in ("gate", "up", "down")},
        },
        "norm": {"scale": tensor("output_norm.weight")},
    }
    model = nnx.eval_shape(lambda: SmolLM(config, nnx.Rngs(0)))
    nnx.update(model, values)
    return model, _tokenizer(reader)


def _config(reader: GGUFReader) -> Config:
    """The sizes of the model in the file."""

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    return Config(
        vocabulary=field("vocab_size"),
        width=field("embedding_length"),
        hidden=field("feed_forward_length"),
        layers=field("block_count"),
        heads=field("attention.head_count"),
        groups=field("attention.head_count_kv"),
        epsilon=field("attention.layer_norm_rms_epsilon"),
        rotary_base=field("rope.freq_base"),
    )


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE as in GPT-2, with each digit a separate token."""

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    tokens = field("tokens")
    merges = [tuple(pair.split(" ")) for pair in field("merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    kinds = zip(tokens, field("token_type"), strict=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == TokenType.CONTROL])
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
