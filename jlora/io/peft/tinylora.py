"""TinyLoRA in PEFT's files: one vector for all modules, and ranks that are at most the sides of the weight."""

import itertools
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.tensors import Tensors

# The axes of the arrays that are ranks. PEFT's are at most the sides of the weight; jlora pads them with zeros.
_TINY_RANKS = {"A": (0,), "B": (1,), "P": (1, 2)}
_VECTOR = "base_model.tinylora_v."


def read_tinylora(config: Config, tensors: Tensors) -> Tensors:
    """The tensors with the vector as one that all modules share, and every rank padded with zeros to r.

    Raises:
        ValueError: if the file has several vectors or lacks projections, or the configuration states other sizes.
    """
    vectors = [name for name in tensors if name.startswith(_VECTOR)]
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".tinylora_A")}
    missing = [f"{module}.tinylora_P" for module in modules if f"{module}.tinylora_P" not in tensors]
    if len(vectors) != 1 or missing:
        raise ValueError(
            f"The file has {len(vectors)} vectors of TinyLoRA and {len(modules) - len(missing)} projections for "
            f"{len(modules)} modules. jlora reads one vector, of weight_tying=1.0, or of one module, because the file "
            "does not say which module has which, and saved projections, save_projection=True."
        )
    groups = max(1, round(len(modules) * (1 - config.get("weight_tying", 0.0))))
    if groups > 1:
        raise ValueError(
            f"The file has one vector of TinyLoRA, and weight_tying = {config.get('weight_tying', 0.0)} gives its "
            f"{len(modules)} modules {groups}: write weight_tying = 1.0 if all were trained with one, or save it again."
        )
    for module in modules:
        a, b = (tensors[f"{module}.tinylora_{factor}"] for factor in "AB")
        if a.shape[0] != min(config["r"], a.shape[-1], len(b)):
            raise ValueError(
                f"{module}.tinylora_A has rank {a.shape[0]}, and r = {config['r']} in adapter_config.json: write the "
                "rank of the tensors there if they are those that were trained, or save it again with PEFT."
            )
    for module, factor in itertools.product(modules, _TINY_RANKS):
        name, axes = f"{module}.tinylora_{factor}", _TINY_RANKS[factor]
        if name in tensors:
            sizes = enumerate(tensors[name].shape)
            pads = [(0, max(config["r"] - size, 0) if axis in axes else 0) for axis, size in sizes]
            tensors[name] = np.pad(tensors[name], pads)
    return tensors | {"shared.v": tensors.pop(vectors[0])}


def cut_tinylora(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> None:
    """Cuts off the ranks above the sides of the weight, which are zeros, in place."""
    for name, factor in itertools.product(entries, _TINY_RANKS):
        key, factors = f"{PREFIX}{name}.tinylora_{factor}", entries[name].factors
        most = min(factors.size("in") or 0, factors.size("out") or 0)
        parts = [slice(most) if axis in _TINY_RANKS[factor] else slice(None) for axis in range(tensors[key].ndim)]
        tensors[key] = np.ascontiguousarray(tensors[key][tuple(parts)])
