"""Models of transformers that `golden/architectures.py` recorded, and their weights as a program of JAX holds them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "architectures.json"
State = dict[str, np.ndarray]
RMS = ("llama", "mistral", "qwen", "gemma", "mixtral", "t5", "phi3", "mamba")  # families whose norms have a `weight`


@functools.cache
def golden() -> dict[str, Any]:
    """The file."""
    return json.loads(GOLDEN.read_text())


def state(model: str, *, initial: bool = False) -> State:
    """The tensors of a model, without those that share another one's storage.

    Arguments:
        model: its name in the file.
        initial: whether tensors that were constant when the model was made are so here: norms of ones, biases of zeros.
    """
    rng = np.random.default_rng(0)
    out = {}
    for name, (shape, value) in golden()[model]["state"].items():
        if name in golden()[model].get("tied", {}):
            continue
        out[name] = rng.normal(size=shape).astype(np.float32)
        if initial and value is not None:
            out[name] = np.full(shape, value, np.float32)
    return out


def flax_path(model: str, name: str, rank: int) -> str:
    """What Flax calls a tensor: dots are slashes, and the last word says what it is."""
    module, _, kind = name.rpartition(".")
    if kind == "weight" and rank > 1:
        kind = "embedding" if re.search("emb|wte|wpe|shared$|relative", module) and rank == 2 else "kernel"
    elif kind == "weight" and not model.startswith(RMS):
        kind = "scale"
    return f"{module}.{kind}".strip(".").replace(".", "/")


def flax_value(path: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor in the layout of Flax: kernels are transposed."""
    if not path.endswith("kernel"):
        return tensor
    return np.ascontiguousarray(tensor.transpose(*range(2, tensor.ndim), 1, 0))


def flax_leaves(model: str, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """The parameters of a model by path, each with the name of its tensor.

    Paths follow the names in the file that `save_pretrained` writes, which are those of earlier releases, unless those
    are the names of parts.
    """
    files = golden()[model].get("file", {})
    renamed = {} if None in files.values() else {name: file for file, name in files.items()}
    leaves = {}
    for name, tensor in tensors.items():
        path = flax_path(model, renamed.get(name, name), tensor.ndim)
        leaves[path] = name, flax_value(path, tensor)
    return leaves


def nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A tree from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def stacked(leaves: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, tuple[list[str], np.ndarray]]:
    """The same with layers of equal shapes in one array: those whose paths differ in their first number."""
    groups: dict[Any, dict[str, tuple[str, np.ndarray]]] = {}
    for path, leaf in leaves.items():
        groups.setdefault((re.sub(r"/\d+(?=/)", "", path, count=1), leaf[1].shape), {})[path] = leaf
    out = {}
    for (path, _), group in groups.items():
        alone = next(iter(group)) if len(group) == 1 else path
        values = [value for _, value in group.values()]
        out[alone] = [name for name, _ in group.values()], values[0] if len(group) == 1 else np.stack(values)
    return out
