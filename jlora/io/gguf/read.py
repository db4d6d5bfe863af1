"""From the fields and tensors of a GGUF file to an adapter."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora._trace.sites import Sites
from jlora.io.gguf.architectures import is_permuted, names_in_llama_cpp, num_heads_of, to_halves
from jlora.io.peft.infer.result import for_weights
from jlora.io.peft.layouts import FactorInFile, Layout
from jlora.io.peft.tensors import from_file, sizes_of
from jlora.io.torch.collected import add_module, check_updates, new_collection, update_of
from jlora.io.torch.factor_layout import ModuleFactors, flat_axes, own_sizes
from jlora.io.torch.module_names import Names, no_match_error
from jlora.io.torch.weight_location import Owners, Weight, WeightLocation, locate_weights, owners_of
from jlora.methods import LoRA
from jlora.methods._base import Adapter

ARCHITECTURE, TYPE = "general.architecture", "general.type"
ADAPTER_TYPE, ALPHA = "adapter.type", "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"

LINEAR: Layout = {"a": FactorInFile("lora_a", "rank in"), "b": FactorInFile("lora_b", "out rank")}
EMBEDDING: Layout = {"a": FactorInFile("lora_a", "in rank"), "b": FactorInFile("lora_b", "out rank")}
_KINDS = ("linear", "conv1d", "embedding")


class Heads(NamedTuple):
    """What the order of the rows of query and key depends on, as for `jlora.gguf.load`."""

    num_heads: int | None
    num_kv_heads: int | None
    permute: bool | None


def check_fields(fields: Mapping[str, Any]) -> tuple[str, float | None]:
    """The architecture and alpha of an adapter's file; None for a scale of 1.

    Raises:
        ValueError: if the file is no LoRA, or one that jlora does not read.
    """
    if fields.get(TYPE) != "adapter" or fields.get(ADAPTER_TYPE) != "lora":
        kind = (fields.get(TYPE), fields.get(ADAPTER_TYPE))
        raise ValueError(f"The file has {TYPE} and {ADAPTER_TYPE} {kind}; those of a LoRA are ('adapter', 'lora').")
    architecture, alpha = fields.get(ARCHITECTURE), fields.get(ALPHA, 0.0)
    if not isinstance(architecture, str):
        raise ValueError(f"The file's {ARCHITECTURE} is {architecture!r}, and no name.")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"The file's {ALPHA} is {alpha!r}, and no finite number.")
    if fields.get(_INVOCATION):
        raise ValueError(f"The file has {_INVOCATION}: llama.cpp applies it to some tokens only, and jlora to all.")
    return architecture, float(alpha) or None


def pairs(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """lora_a and lora_b of every module, and the reason for each tensor that is refused."""
    modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    refused = {}
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".weight.lora_")
        if module and factor in ("a", "b"):
            modules[module][factor] = tensor
        else:
            refused[name] = "it is no factor of a LoRA, and llama.cpp reads no others."
    for module, by_factor in modules.items():
        shapes = [tensor.shape for tensor in by_factor.values()]
        if len(by_factor) < 2:
            refused[module] = f"it has lora_{next(iter(by_factor))} alone."
        elif any(len(shape) != 2 for shape in shapes):
            refused[module] = f"its factors have the shapes {shapes}: jlora reads no LoRA of experts from GGUF."
    return {m: (f["a"], f["b"]) for m, f in modules.items() if m not in refused}, refused


def method_of(pair: tuple[np.ndarray, np.ndarray], alpha: float | None) -> LoRA:
    """The method of a module: llama.cpp takes the rank from B, and the scale alpha / rank from both."""
    return LoRA(pair[1].shape[1], alpha)


def read_adapter(
    fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], sites: Sites, names: Names, heads: Heads
) -> Adapter:
    """The adapter of a file.

    Arguments:
        fields, tensors: of the file.
        sites: of the program.
        names: the map.
        heads: as the caller has them.

    Raises:
        ValueError: if the file and the program do not fit.
    """
    architecture, alpha = check_fields(fields)
    permuted = is_permuted(architecture, heads.permute)
    weights = {path: Weight(site.shape, site.roles) for path, site in sites.items()}
    names = for_weights(names, weights)
    locations = locate_weights(names, weights)
    owners = owners_of(locations)
    modules, refused = pairs(tensors)
    if refused:
        raise ValueError("The file cannot be read:\n  " + "\n  ".join(f"{n}: {why}" for n, why in refused.items()))
    by_module = _owners_in_llama_cpp(owners, architecture)
    unplaced = {module: by_module for module in modules if module not in by_module}
    if unplaced:
        raise no_match_error("These in the file have no weight in the program:", unplaced, names, sites)
    collected = new_collection()
    for module, (a, b) in modules.items():
        name = by_module[module]
        count = num_heads_of(module, heads.num_heads, heads.num_kv_heads) if permuted else None
        b = b if count is None else to_halves(b, count, module)
        add_module(collected, name, _factors(name, (a, b), alpha, owners), owners)
    adapter = {path: update_of(by_index, locations[path], True) for path, by_index in collected.items()}
    check_updates(adapter, sites)
    for path in adapter:
        if sites[path].is_lookup and sites[path].is_product:
            raise ValueError(f"{path} is an embedding and the output head at once; llama.cpp adapts one use alone.")
    arrays = jax.device_put({path: adapter[path].factors for path in sites if path in adapter})
    return {path: dataclasses.replace(adapter[path], factors=factors) for path, factors in arrays.items()}


def _owners_in_llama_cpp(owners: Owners, architecture: str) -> dict[str, str]:
    """The torch name of every module that llama.cpp may adapt, by llama.cpp's name."""
    adaptable = [name for name, weights in owners.items() if weights[0].location.module.kind in _KINDS]
    by_module: dict[str, str] = {}
    for name, module in names_in_llama_cpp(adaptable, architecture).items():
        if by_module.setdefault(module, name) != name:
            raise ValueError(f"{by_module[module]} and {name} are both {module} in llama.cpp.")
    return by_module


def _factors(name: str, pair: tuple[np.ndarray, np.ndarray], alpha: float | None, owners: Owners) -> ModuleFactors:
    location = owners[name][0].location
    try:
        method = method_of(pair, alpha)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    axes, layout = flat_axes(method, location), layout_of(location)
    sizes = sizes_of(owners[name]).with_axes(own_sizes(method, location))
    arrays = {
        factor: from_file(array, axes[factor], layout[factor].axes, sizes, f"{name}.{layout[factor].suffix}")
        for factor, array in zip("ab", pair, strict=True)
    }
    return ModuleFactors(method, 1.0, arrays, axes)


def layout_of(location: WeightLocation) -> Layout:
    """The layout of a module's factors: llama.cpp looks up rows of the A of an embedding."""
    return EMBEDDING if location.module.kind == "embedding" else LINEAR
