"""The model of `golden/peft_types.py` in JAX, two of its layers stacked, and the adapters that are written for PEFT."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.io.peft import Module

NAMES = {
    "layers/kernel": "layers.{i}",
    "layers/bias": Module("layers.{i}.bias", "parameter"),
    "norm/scale": Module("norm.weight", "parameter"),
    "norm/bias": Module("norm.bias", "parameter"),
    "out/kernel": "out",
    "out/bias": Module("out.bias", "parameter"),
}

EXPORTS: dict[str, jlora.Method | dict[str, jlora.Method]] = {
    "tinylora": jlora.TinyLoRA(2, 3),
    "vblora": jlora.VBLoRA(2, 5, 4, offset=False),
    "unilora": jlora.UniLoRA(2, 300, offset=False),
    "pvera": jlora.PVeRA(3),
    "monteclora": jlora.MonteCLoRA(3, 5.0, samples=4),
    "super_tuning": jlora.SuperTuning(0.8),
    "supra": jlora.SuperTuning(0.8, rank=2, alpha=3.0),
    "beft": {"(layers|out)/bias": jlora.Full()},
    "ln_tuning": {"norm/.*": jlora.Full()},
    "gralora": jlora.GraLoRA(4, 2, 6.0),
    "bd_lora": jlora.BDLoRA(4, 2, "out", 6.0),
    "kasa": jlora.KaSA(2, 6.0),
    "osf": jlora.OSF(3),
    "c3a": jlora.C3A(4),
    "c3a_blocks": {"layers/kernel": jlora.C3A(2), "out/kernel": jlora.C3A(4)},
    "fourierft_counts": {
        "layers/kernel": jlora.FourierFT(12, 30.0, 3, places="torch"),
        "out/kernel": jlora.FourierFT(5, 30.0, 3, places="torch"),
    },
    "hra_biases": {"(layers|out)/kernel": jlora.HRA(2), "(layers|out)/bias": jlora.Full()},
    "fourierft_biases": {
        "layers/kernel": jlora.FourierFT(12, 30.0, 3, places="torch"),
        "(layers|out)/bias": jlora.Full(),
    },
    "fourierft": jlora.FourierFT(12, 30.0, 3, places="torch"),
    "waveft": jlora.WaveFT(13, 2.0, 3, places="torch"),
    "shira": jlora.SHiRA(1),
    "peanut": jlora.PEANuT(3, 1, "gelu", 0.5),
    "randlora": jlora.RandLoRA(3, 5.0, 4, matrices=(12, 8)),
    "hira": {"layers/kernel": jlora.HiRA(2, 3.0), "out/kernel": jlora.HiRA(2)},
    "delora": {"layers/kernel": jlora.DeLoRA(2, 4.0), "out/kernel": jlora.DeLoRA(3, 4.0)},
    "miss": jlora.MiSS(4),
    "glora": {"layers/kernel": jlora.GLoRA(2, "lora", "lora"), "(layers|out)/bias": jlora.Full()},
}


def params_of(state: dict[str, np.ndarray]) -> Any:
    layers = [{"kernel": state[f"layers.{i}.weight"].T, "bias": state[f"layers.{i}.bias"]} for i in (0, 1)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    return {
        "layers": stacked,
        "norm": {"scale": state["norm.weight"], "bias": state["norm.bias"]},
        "out": {"kernel": jnp.asarray(state["out.weight"].T), "bias": state["out.bias"]},
    }


def apply(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ p["kernel"] + p["bias"][None]), None

    x = jax.lax.scan(layer, x, params["layers"])[0]
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    return x @ params["out"]["kernel"] + params["out"]["bias"][None]


def sites_of(params: Any) -> jlora.Sites:
    return jlora.trace(apply, params, jnp.zeros((3, 8)))


def save(name: str, folder: Path, state: dict[str, np.ndarray]) -> jlora.Adapter:
    """Saves the adapter of this name, all its numbers at random."""
    params = params_of(state)
    export = EXPORTS[name]
    targets = export if isinstance(export, dict) else {".*kernel": export}
    adapter = jlora.init(jax.random.key(0), sites_of(params), targets, params=params)
    rng = np.random.RandomState(zlib.crc32(name.encode()))

    def fill(array: jax.Array) -> np.ndarray:
        return np.asarray(0.5 * rng.normal(size=array.shape), np.float32)

    adapter = {p: jlora.Update(**(vars(u) | {"factors": jax.tree.map(fill, u.factors)})) for p, u in adapter.items()}
    assert not jlora.peft.save(folder, adapter, NAMES, params=params)
    return adapter
