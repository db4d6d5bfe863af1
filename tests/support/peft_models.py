"""Small models in JAX and the torch modules that hold their weights: BERT, GPT-2, Llama, Mixtral, a CNN.

The torch side is in `golden/exchange.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import minilm
from jlora.io.peft import Module, Names
from jlora.io.peft import names as maps

Array = jax.Array
V, D, H, K, F, L, E, T = 30, 16, 2, 8, 24, 2, 3, 6  # words, width, heads, head size, hidden, layers, experts, length
KV = 1  # heads of key and value in Llama


def norm(x: Array, p: Mapping[str, Array], *, mean: bool = True, epsilon: float = 1e-5) -> Array:
    x = x - x.mean(-1, keepdims=True) if mean else x
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon) * spread(p["scale"], x)
    return x + spread(p["bias"], x) if "bias" in p else x


def spread(vector: Array, like: Array) -> Array:
    return vector.reshape([1] * (like.ndim - vector.ndim) + list(vector.shape))


def dense(x: Array, p: Mapping[str, Array], over: int = 1) -> Array:
    y = jnp.tensordot(x, p["kernel"], over)
    return y + spread(p["bias"], y) if "bias" in p else y


def attention(p: Any, x: Array, *, rotate: bool = False) -> Array:
    q, k, v = (dense(x, p[name]) for name in ("query", "key", "value"))
    if rotate:
        q, k = rotary(q), rotary(k)
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(q.shape[-1]))
    causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
    scores = jnp.where(causal, scores, jnp.finfo(jnp.float32).min)
    return dense(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v), p["out"], 2)


def rotary(x: Array) -> Array:
    half = x.shape[-1] // 2
    angles = np.arange(T)[:, None] / 10000 ** (np.arange(half) / half)[None]
    cos, sin = (jnp.asarray(np.tile(f(angles), 2), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    return x * cos + jnp.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def gpt2(p: Any, ids: Array) -> Array:
    x = p["embed"]["embedding"][ids] + p["positions"]["embedding"][jnp.arange(T)][None]
    for layer in p["layers"]:
        x = x + attention(layer["attention"], norm(x, layer["norm_1"]))
        up = dense(norm(x, layer["norm_2"]), layer["mlp"]["up"])
        x = x + dense(jax.nn.gelu(up, approximate=True), layer["mlp"]["down"])
    return norm(x, p["norm"]) @ p["embed"]["embedding"].T


def rms(x: Array, p: Any) -> Array:
    return norm(x, p, mean=False, epsilon=1e-6)


def gated(p: Any, x: Array) -> Array:
    gate, up = dense(x, p["gate"]), dense(x, p["up"])
    return dense(jax.nn.silu(gate) * up, p["down"])


def gated_fused(p: Any, x: Array) -> Array:
    gate, up = jnp.split(dense(x, p["gate_up"]), 2, -1)
    return dense(jax.nn.silu(gate) * up, p["down"])


def experts(p: Any, x: Array) -> Array:
    """Every expert on every token, and of each token the two that its router likes best."""
    chances = jax.nn.softmax(dense(x, p["router"]))
    best, index = lax.top_k(chances, 2)
    share = (jax.nn.one_hot(index, E) * (best / best.sum(-1, keepdims=True))[..., None]).sum(-2)
    wide = jnp.broadcast_to(x[None], (E, *x.shape))
    gate, up = jnp.split(jnp.einsum("ebtd,edf->ebtf", wide, p["gate_up"]["kernel"]), 2, -1)
    y = jnp.einsum("ebtf,efd->ebtd", jax.nn.silu(gate) * up, p["down"]["kernel"])
    return jnp.einsum("bte,ebtd->btd", share, y)


def block(x: Array, layer: Any, mlp: Callable[[Any, Array], Array]) -> Array:
    x = x + attention(layer["attention"], rms(x, layer["norm_1"]), rotate=True)
    return x + mlp(layer["mlp"], rms(x, layer["norm_2"]))


def llama(mlp: Callable[[Any, Array], Array], p: Any, ids: Array) -> Array:
    """Layers in a list, or stacked in a scan; the head is a weight of its own or the embedding."""
    x = p["embed"]["embedding"][ids]
    if isinstance(p["layers"], dict):
        x, _ = lax.scan(lambda y, layer: (block(y, layer, mlp), None), x, p["layers"])
    else:
        for layer in p["layers"]:
            x = block(x, layer, mlp)
    x = rms(x, p["norm"])
    return dense(x, p["head"]) if "head" in p else x @ p["embed"]["embedding"].T


def cnn(p: Any, x: Array) -> Array:
    for name in ("first", "second"):
        kernel, order = p[name]["kernel"], ("NCHW", "HWIO" if name == "first" else "OIHW", "NCHW")
        x = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=order)
        x = jax.nn.relu(x + p[name]["bias"][None, :, None, None])
    return dense(x.reshape(x.shape[0], -1), p["head"])


State = Mapping[str, np.ndarray]


def vector(state: State, name: str) -> dict[str, np.ndarray]:
    """A norm's parameters."""
    both = {"scale": f"{name}.weight", "bias": f"{name}.bias"}
    return {key: state[full] for key, full in both.items() if full in state}


def linear(state: State, name: str, *shape: int) -> dict[str, np.ndarray]:
    """A kernel of some shape from a weight (out, in), and its bias."""
    out = {"kernel": state[f"{name}.weight"].T.reshape(shape)}
    return out | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def bert_params(state: State) -> Any:
    def heads(name: str) -> dict[str, np.ndarray]:
        kernel = linear(state, name, D, H, K)
        return kernel | {"bias": kernel["bias"].reshape(H, K)}

    at = "encoder.layer.{}".format
    return {
        "word_embedding": {"embedding": state["embeddings.word_embeddings.weight"]},
        "position_embedding": {"embedding": state["embeddings.position_embeddings.weight"]},
        "type_embedding": {"embedding": state["embeddings.token_type_embeddings.weight"]},
        "embedding_norm": vector(state, "embeddings.LayerNorm"),
        **{
            f"layer_{i}": {
                "attention": {
                    **{n: heads(f"{at(i)}.attention.self.{n}") for n in ("query", "key", "value")},
                    "out": linear(state, f"{at(i)}.attention.output.dense", H, K, D),
                },
                "attention_norm": vector(state, f"{at(i)}.attention.output.LayerNorm"),
                "feed_forward": {
                    "up": linear(state, f"{at(i)}.intermediate.dense", D, F),
                    "down": linear(state, f"{at(i)}.output.dense", F, D),
                },
                "feed_forward_norm": vector(state, f"{at(i)}.output.LayerNorm"),
            }
            for i in range(L)
        },
    }


def bert(p: Any, ids: Array) -> Array:
    model = minilm.MiniLM(V, T, 2, D, L, H, F, 1e-12)
    out = model.apply({"params": p}, ids, jnp.ones_like(ids))
    assert isinstance(out, jax.Array)
    return out


def gpt2_params(state: State) -> Any:
    def conv1d(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].reshape(shape), "bias": state[f"{name}.bias"]}

    def layer(at: str) -> Any:
        kernels = np.split(state[f"{at}.attn.c_attn.weight"], 3, 1)
        biases = np.split(state[f"{at}.attn.c_attn.bias"], 3)
        heads = {
            name: {"kernel": kernel.reshape(D, H, K), "bias": bias.reshape(H, K)}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        return {
            "attention": heads | {"out": conv1d(f"{at}.attn.c_proj", H, K, D)},
            "mlp": {"up": conv1d(f"{at}.mlp.c_fc", D, 4 * D), "down": conv1d(f"{at}.mlp.c_proj", 4 * D, D)},
            "norm_1": vector(state, f"{at}.ln_1"),
            "norm_2": vector(state, f"{at}.ln_2"),
        }

    return {
        "embed": {"embedding": state["transformer.wte.weight"]},
        "positions": {"embedding": state["transformer.wpe.weight"]},
        "layers": [layer(f"transformer.h.{i}") for i in range(L)],
        "norm": vector(state, "transformer.ln_f"),
    }


def llama_params(mlp: Callable[[State, str], Any], state: State) -> Any:
    def layer(at: str) -> Any:
        return {
            "attention": {
                "query": linear(state, f"{at}.self_attn.q_proj", D, H, K),
                "key": linear(state, f"{at}.self_attn.k_proj", D, KV, K),
                "value": linear(state, f"{at}.self_attn.v_proj", D, KV, K),
                "out": linear(state, f"{at}.self_attn.o_proj", H, K, D),
            },
            "mlp": mlp(state, f"{at}.mlp"),
            "norm_1": vector(state, f"{at}.input_layernorm"),
            "norm_2": vector(state, f"{at}.post_attention_layernorm"),
        }

    out = {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": [layer(f"model.layers.{i}") for i in range(L)],
        "norm": vector(state, "model.norm"),
    }
    return out | ({"head": linear(state, "lm_head", D, V)} if "lm_head.weight" in state else {})


def gated_params(state: State, at: str) -> Any:
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {name: linear(state, f"{at}.{name}_proj", *shape) for name, shape in shapes.items()}


def gated_fused_params(state: State, at: str) -> Any:
    p = gated_params(state, at)
    return {"gate_up": {"kernel": np.concatenate([p["gate"]["kernel"], p["up"]["kernel"]], 1)}, "down": p["down"]}


def experts_params(state: State, at: str) -> Any:
    many = {name: {"kernel": state[f"{at}.experts.{name}_proj"].transpose(0, 2, 1)} for name in ("gate_up", "down")}
    return many | {"router": linear(state, f"{at}.gate", D, E)}


def in_a_scan(params: Callable[[State], Any], state: State) -> Any:
    p = params(state)
    return p | {"layers": jax.tree.map(lambda *layers: np.stack(layers), *p["layers"])}


def cnn_params(state: State) -> Any:
    return {
        "first": {"kernel": state["0.weight"].transpose(2, 3, 1, 0), "bias": state["0.bias"]},
        "second": {"kernel": state["2.weight"], "bias": state["2.bias"]},
        "head": linear(state, "5", 54, 5),
    }


CNN: Names = {
    "first/kernel": Module("0", "conv"),
    "first/bias": Module("0.bias", "parameter"),
    "second/kernel": Module("2", "conv"),
    "second/bias": Module("2.bias", "parameter"),
    "head/kernel": "5",
    "head/bias": Module("5.bias", "parameter"),
}
FUSED: Names = {
    **maps.LLAMA,
    "layers/mlp/gate_up/kernel": ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of torch as a program of JAX.

    Arguments:
        torch: which model of torch it is.
        apply: the program.
        params: its parameters from torch's.
        names: the map.
    """

    torch: str
    apply: Callable[[Any, Array], Array]
    params: Callable[[State], Any]
    names: Names


def of_llama(torch: str, mlp: Any, make: Any, names: Names, scanned: bool = False) -> Model:
    params = functools.partial(llama_params, make)
    params = functools.partial(in_a_scan, params) if scanned else params
    return Model(torch, functools.partial(llama, mlp), params, names)


MODELS = {
    "bert": Model("bert", bert, bert_params, maps.BERT),
    "gpt2": Model("gpt2", gpt2, gpt2_params, maps.GPT2),
    "llama": of_llama("llama", gated, gated_params, maps.LLAMA),
    "llama_tied": of_llama("llama_tied", gated, gated_params, maps.LLAMA_TIED),
    "llama_scanned": of_llama("llama", gated, gated_params, maps.LLAMA, True),
    "llama_fused": of_llama("llama", gated_fused, gated_fused_params, FUSED, True),
    "mixtral": of_llama("mixtral", experts, experts_params, maps.MIXTRAL),
    "mixtral_scanned": of_llama("mixtral", experts, experts_params, maps.MIXTRAL, True),
    "cnn": Model("cnn", cnn, cnn_params, CNN),
}
