"""The model of `golden/peft_types.py` in JAX, two of its layers stacked, and the adapters that are written for PEFT."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

NAMES = {"layers/kernel": "layers.{i}", "out/kernel": "out"}

EXPORTS: dict[str, jlora.Method] = {
    "tinylora": jlora.TinyLoRA(2, 3),
    "vblora": jlora.VBLoRA(2, 5, 4),
    "unilora": jlora.UniLoRA(2, 300),
    "peanut": jlora.PEANuT(3, 1, "gelu", 0.5),
}


def params_of(state: dict[str, np.ndarray]) -> Any:
    layers = [{"kernel": state[f"layers.{i}.weight"].T, "bias": state[f"layers.{i}.bias"]} for i in (0, 1)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return {"layers": stacked, "out": {"kernel": jnp.asarray(state["out.weight"].T), "bias": state["out.bias"]}}


def apply(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ p["kernel"] + p["bias"][None]), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"]["kernel"] + params["out"]["bias"][None]


def sites_of(params: Any) -> jlora.Sites:
    return jlora.trace(apply, params, jnp.zeros((3, 8)))


def save(name: str, folder: Path, state: dict[str, np.ndarray]) -> jlora.Adapter:
    """Saves the adapter of this name, all its numbers at random."""
    params = params_of(state)
    adapter = jlora.init(jax.random.key(0), sites_of(params), {".*kernel": EXPORTS[name]}, params=params)
    rng = np.random.RandomState(zlib.crc32(name.encode()))

    def fill(array: jax.Array) -> np.ndarray:
        return np.asarray(0.5 * rng.normal(size=array.shape), np.float32)

    adapter = {p: jlora.Update(**(vars(u) | {"factors": jax.tree.map(fill, u.factors)})) for p, u in adapter.items()}
    assert not jlora.peft.save(folder, adapter, NAMES, params=params)
    return adapter
