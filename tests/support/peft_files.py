"""PEFT's files and outputs that `golden/exchange.py` recorded, and the models they belong to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from tests.support import peft_exports
from tests.support.peft_models import MODELS

GOLDEN = Path(__file__).parents[1] / "golden" / "exchange.npz"
FILES = ("adapter_config.json", "adapter_model.safetensors")
BOUND = 1e-5  # of the largest entry, in float32


@functools.cache
def golden() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """The file's arrays by section, name and key."""
    out: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(GOLDEN) as file:
        for full in file:
            section, name, key = full.split("/", 2)
            out.setdefault(section, {}).setdefault(name, {})[key] = file[full]
    return out


@functools.cache
def program(model: str) -> tuple[Any, jlora.Sites, Any]:
    """A model's parameters, its sites, and the function from parameters to the output for the golden input."""
    own = MODELS[model]
    params, sites = peft_exports.program(model, golden()["model"][own.torch])
    x = jnp.asarray(golden()["input"][own.torch]["x"])
    return params, sites, jax.jit(lambda p: own.apply(p, x))


def error(got: Any, want: np.ndarray) -> float:
    """The largest difference in units of the largest entry; infinite where the shapes differ."""
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max()) if got.shape == want.shape else np.inf


def unpack(files: dict[str, np.ndarray], folder: Path) -> Path:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(files[name].tobytes())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
