"""A checkpoint with the names of a Llama, and programs that hold its weights in many layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jlora
from jlora.io.torch.weight_location import Weight, locate_weights

D, H, KV, K, F, L, E, V = 12, 3, 1, 4, 20, 4, 2, 30  # width, heads, heads of key and value, ..., experts, words
State = dict[str, np.ndarray]
AT = "model.layers.{}.".format


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def llama(*, constant_norms: bool = False, layers: int = L) -> State:
    """A checkpoint with the names of a Llama."""
    shapes = {"self_attn.q_proj": (H * K, D), "self_attn.k_proj": (KV * K, D), "self_attn.v_proj": (KV * K, D)}
    shapes |= {"self_attn.o_proj": (D, H * K), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    names = {f"{AT(i)}{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    state = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(names.items())}
    if constant_norms:
        state |= {name: np.ones(D, np.float32) for name, tensor in state.items() if tensor.ndim == 1}
    return state


def layer(state: State, i: int) -> dict[str, Any]:
    def kernel(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{AT(i)}{name}.weight"].T.reshape(shape)}

    return {
        "attention": {
            "query": kernel("self_attn.q_proj", D, H, K),
            "key": kernel("self_attn.k_proj", D, KV, K),
            "value": kernel("self_attn.v_proj", D, KV, K),
            "out": kernel("self_attn.o_proj", H, K, D),
        },
        "mlp": {"gate": kernel("mlp.gate_proj", D, F), "up": kernel("mlp.up_proj", D, F)}
        | {"down": kernel("mlp.down_proj", F, D)},
        "input_norm": {"scale": state[f"{AT(i)}input_layernorm.weight"]},
        "other_norm": {"scale": state[f"{AT(i)}post_attention_layernorm.weight"]},
    }


def plain(state: State) -> dict[str, Any]:
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": [layer(state, i) for i in range(L)],
        "norm": {"scale": state["model.norm.weight"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }


def stacked(params: dict[str, Any], axis: int = 0) -> dict[str, Any]:
    return params | {
        "layers": jax.tree.map(lambda *layers: np.stack(layers, min(axis, layers[0].ndim)), *params["layers"])
    }


def with_layers(params: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return params | {"layers": [change(layer) for layer in params["layers"]]}


def fused_attention(layer: dict[str, Any]) -> dict[str, Any]:
    """Query, key and value in one kernel, of which the query is wider."""
    attention = dict(layer["attention"])
    kernels = [attention.pop(name)["kernel"].reshape(D, -1) for name in ("query", "key", "value")]
    return layer | {"attention": attention | {"qkv": {"kernel": np.concatenate(kernels, 1)}}}


def fused_mlp(layer: dict[str, Any]) -> dict[str, Any]:
    mlp = dict(layer["mlp"])
    both = np.stack([mlp.pop(name)["kernel"] for name in ("gate", "up")], 1)
    return layer | {"mlp": mlp | {"gate_up": {"kernel": both}}}


def interleaved_mlp(layer: dict[str, Any]) -> dict[str, Any]:
    """Columns of gate and up in turns."""
    fused = fused_mlp(layer)["mlp"]
    turns = fused["gate_up"]["kernel"].transpose(0, 2, 1).reshape(D, 2 * F)
    return layer | {"mlp": fused | {"gate_up": {"kernel": turns}}}


def rotary(layer: dict[str, Any]) -> dict[str, Any]:
    """The rows of each head's query regrouped: pairs in the place of halves."""
    kernel = layer["attention"]["query"]["kernel"].reshape(D, H, 2, K // 2).transpose(0, 1, 3, 2).reshape(D, H, K)
    return layer | {"attention": layer["attention"] | {"query": {"kernel": kernel}}}


def fused_in_torch(state: State) -> State:
    """The same model with query, key and value in one tensor, and gate and up in one."""
    state = dict(state)
    for i in range(L):
        for joined, names in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = joined.split(".")[0]
            parts = [state.pop(f"{AT(i)}{module}.{name}_proj.weight") for name in names]
            state[f"{AT(i)}{joined}.weight"] = np.concatenate(parts)
    return state


def assert_rebuilt(names: jlora.peft.InferredNames, params: Any, state: State) -> None:
    """Every parameter from the checkpoint and every tensor from the parameters, both exactly."""
    leaves = {
        jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(a) for k, a in jax.tree.leaves_with_path(params)
    }
    assert names.complete
    assert set(names.leaves) | set(names.constant) == set(leaves)
    for path in names.leaves:
        np.testing.assert_array_equal(names.parameter(path, state.__getitem__), leaves[path])
    for name in {*state} - {*names.unused}:
        rebuilt = names.tensor(name, np.zeros_like(state[name]), leaves.__getitem__)
        cast = state[name].astype(next(iter(leaves.values())).dtype)
        np.testing.assert_array_equal(rebuilt.astype(cast.dtype), cast)


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "plain": plain,
    "stacked": lambda s: stacked(plain(s)),
    "stacked on the second axis": lambda s: stacked(plain(s), 1),
    "fused attention": lambda s: with_layers(plain(s), fused_attention),
    "fused and stacked": lambda s: stacked(with_layers(plain(s), lambda p: fused_mlp(fused_attention(p)))),
    "columns in turns": lambda s: with_layers(plain(s), interleaved_mlp),
    "rotary": lambda s: with_layers(plain(s), rotary),
    "rotary and stacked": lambda s: stacked(with_layers(plain(s), rotary)),
    "transposed": lambda s: jax.tree.map(lambda a: np.ascontiguousarray(a.T), plain(s)),
    "padded": lambda s: plain(s) | {"embed": {"embedding": np.pad(s["model.embed_tokens.weight"], [(0, 2), (0, 0)])}},
    "alternating stacks": lambda s: (
        plain(s) | {"layers": [stacked({"layers": plain(s)["layers"][k::2]})["layers"] for k in (0, 1)]}
    ),
}


def located(names: Any, params: Any) -> dict[str, Any]:
    """What a map says of every parameter."""
    leaves = jax.tree.leaves_with_path(params)
    weights = {jax.tree_util.keystr(k, simple=True, separator="/"): Weight(a.shape, ()) for k, a in leaves}
    return {
        path: (at.modules, at.module.kind, at.module.part, at.sizes_joined)
        for path, at in locate_weights(names, weights).items()
    }
