"""From an adapter to the fields and tensors of a GGUF file."""

import collections
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.io.gguf.architectures import is_permuted, names_in_llama_cpp, num_heads_of, to_pairs
from jlora.io.gguf.read import ADAPTER_TYPE, ALPHA, ARCHITECTURE, TYPE, Heads, layout_of
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.module_parts import locate_adapter, module_entries
from jlora.io.peft.tensors import to_file
from jlora.io.peft.write import as_one_method
from jlora.io.torch.join_modules import times, total_scale
from jlora.io.torch.module_names import Names
from jlora.methods import DoRA, Full, LoRA
from jlora.methods._base import Adapter

_DTYPES = tuple(jnp.dtype(name) for name in ("float32", "float16", "bfloat16"))


class File(NamedTuple):
    """What is written: fields, tensors, and a sentence for each change of form."""

    fields: dict[str, str | float]
    tensors: dict[str, np.ndarray]
    notes: tuple[str, ...]


def file_of(adapter: Adapter, names: Names, params: Any, architecture: str, heads: Heads) -> File:
    """The content of the file for an adapter.

    Arguments:
        adapter: the adapter.
        names: the map.
        params: the base parameters, or None.
        architecture: llama.cpp's name for the model.
        heads: as the caller has them.

    Raises:
        ValueError: if llama.cpp has no equal.
    """
    if not adapter:
        raise ValueError("The adapter is empty: there is nothing to save.")
    refused = {path: type(u.method).__name__ for path, u in adapter.items() if isinstance(u.method, (DoRA, Full))}
    if refused:
        raise ValueError(f"GGUF holds LoRA alone, and the adapter has {refused}: merge these, or adapt by LoRA.")
    permuted = is_permuted(architecture, heads.permute)
    locations = locate_adapter(adapter, names, BaseParams(params))
    adapter, notes = as_one_method(adapter, {}, params, "vllm")
    entries = module_entries(adapter, locations)
    _check_kinds(entries)
    modules = names_in_llama_cpp(entries, architecture)
    alpha = _alpha(entries)
    tensors: dict[str, np.ndarray] = {}
    for name, (location, factors) in entries.items():
        layout, ratio = layout_of(location), _own_alpha(entries[name]) / alpha
        a, b = (to_file(factors.arrays[f], factors.axes[f], layout[f].axes, location.kernel) for f in "ab")
        if ratio != 1:
            b = times(b, ratio)
            notes.append(f"{name}: B times {ratio:g}, since GGUF has one alpha, {alpha:g}, for all modules.")
        count = num_heads_of(modules[name], heads.num_heads, heads.num_kv_heads) if permuted else None
        b = b if count is None else to_pairs(b, count, modules[name])
        for factor, array in (("lora_a", a), ("lora_b", b)):
            tensors[f"{modules[name]}.weight.{factor}"] = array if array.dtype in _DTYPES else array.astype(np.float32)
    fields: dict[str, str | float] = {ARCHITECTURE: architecture, TYPE: "adapter", ADAPTER_TYPE: "lora", ALPHA: alpha}
    return File(fields, tensors, tuple(notes))


def _check_kinds(entries: dict[str, ModuleEntry]) -> None:
    refused = {n: e.location.module.kind for n, e in entries.items() if e.location.module.kind in ("conv", "parameter")}
    if refused:
        raise ValueError(f"GGUF holds LoRA of linear layers and embeddings, and these are neither: {refused}.")
    tied = [name for name, entry in entries.items() if entry.location.module.tied]
    if tied:
        raise ValueError(
            f"{tied} are embeddings and output heads at once; llama.cpp adapts one use alone: leave them out."
        )


def _own_alpha(entry: ModuleEntry) -> float:
    """What alpha would have to be for this module alone."""
    method = entry.factors.method
    assert isinstance(method, LoRA)
    if method.alpha is not None and not method.rank_stabilized:
        return method.alpha * entry.factors.scale
    return total_scale(entry.factors) * method.rank


def _alpha(entries: dict[str, ModuleEntry]) -> float:
    """The alpha that most modules need; of several the smallest."""
    counts = collections.Counter(float(np.float32(_own_alpha(entry))) for entry in entries.values())
    if 0.0 in counts:
        raise ValueError("A module has the scale 0, which llama.cpp takes for no scale: leave it out.")
    return min(counts, key=lambda alpha: (-counts[alpha], abs(alpha)))
