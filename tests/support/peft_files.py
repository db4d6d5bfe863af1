"""PEFT's files and outputs that `golden/exchange.py` recorded, and the models they belong to."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io.peft import Names
from tests.support import peft_exports
from tests.support.peft_models import MODELS
from tests.support.recorded import Sections, sections

GOLDEN = Path(__file__).parents[1] / "golden" / "exchange.npz"
FILES = ("adapter_config.json", "adapter_model.safetensors")
NAMES: Names = MODELS["bert"].names
QUERY = "base_model.model.encoder.layer.0.attention.self.query"
BOUND = 1e-5  # of the largest entry, in float32

# Forms that share their code with another one that the default run reads.
NIGHTLY = (
    *("output_bias", "convolution_output_bias", "conv1d_weights", "weights_pissa", "pissa_dora", "conv1d_pissa"),
    *("olora", "pissa_iterated", "lora_ga", "adalora", "convolution_adalora", "effective_loha"),
    *("tokens_alone_tied", "compressed"),
)


@functools.cache
def golden() -> Sections:
    """The file's arrays by section, name and key."""
    return sections(GOLDEN)


@functools.cache
def program(model: str) -> tuple[Any, jlora.Sites, Any]:
    """A model's parameters, its sites, and the function from parameters to the output for the golden input."""
    entry = MODELS[model]
    params, sites = peft_exports.program(model, golden()["model"][entry.torch])
    x = jnp.asarray(golden()["input"][entry.torch]["x"])
    return params, sites, jax.jit(lambda p: entry.apply(p, x))


def error(actual: Any, expected: np.ndarray) -> float:
    """The largest difference in units of the largest entry; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return np.inf
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def unpack(files: dict[str, np.ndarray], folder: Path) -> Path:
    """Writes recorded files into a new folder."""
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(files[name].tobytes())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change_configuration(folder: Path, **fields: Any) -> None:
    """Sets fields of the configuration in `folder`; `...` deletes a field."""
    file = folder / FILES[0]
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None]) -> None:
    """Writes what `change` returns in place of the tensors in `folder`, or the tensors that it changed in place."""
    tensors = load_file(folder / FILES[1])
    save_file(change(tensors) or tensors, folder / FILES[1])


def load_for_bert(folder: Path, names: Names = NAMES) -> jlora.Adapter:
    """The adapter that the files in `folder` hold for the BERT of the tests."""
    params, sites, _ = program("bert")
    return jlora.peft.load(folder, sites, names, params=params)


def settled(config: np.ndarray) -> dict[str, Any]:
    """A configuration with its lists in order: PEFT writes some of them from sets."""
    fields = json.loads(config.tobytes())
    return {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in fields.items()}
