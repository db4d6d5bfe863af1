"""What a file of loralib holds."""

import collections

import numpy as np

from jlora.io.info.modules import FileFactors, summarize
from jlora.io.info.report import Content
from jlora.io.peft.layouts import FactorInFile
from jlora.methods import LoRA

_LAYOUT = {"a": FactorInFile("lora_A", "rank in"), "b": FactorInFile("lora_B", "out rank")}
_MERGED = {**_LAYOUT, "a": FactorInFile("lora_A", "(groups rank) in")}
_ALPHA = (
    "loralib records neither alpha nor the enabled groups of a MergedLinear: the norms are those for a scale of 1, and "
    "jlora.loralib.load takes both as arguments."
)


def is_state(names: list[str]) -> bool:
    """Whether tensors of these names are an adapter of loralib."""
    return any(name.endswith((".lora_A", ".lora_B")) for name in names)


def read(tensors: dict[str, np.ndarray]) -> Content:
    """The content of loralib's state dict."""
    modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    refused = []
    for name, tensor in tensors.items():
        module, _, factor = name.rpartition(".lora_")
        if factor in ("A", "B") and module:
            modules[module][factor] = tensor
        else:
            refused.append(f"{name} is not a tensor of an adapter: pass loralib.lora_state_dict(model).")
    updates, notes = [], [_ALPHA]
    for name, pair in modules.items():
        try:
            factors = _factors(pair)
            updates.append(summarize(name, factors))
        except ValueError as error:
            refused.append(f"{name}: {error}")
            continue
        if not factors.has_norm:
            notes.append(f"{name} is a MergedLinear with {len(pair['A']) // factors.method.rank} enabled groups.")
    return Content(tuple(updates), tuple(refused), tuple(notes))


def _factors(pair: dict[str, np.ndarray]) -> FileFactors[LoRA]:
    """The factors of a module; those of a MergedLinear have several times the rank in A.

    Raises:
        ValueError: if one of the two is missing, or they do not fit.
    """
    if set(pair) != {"A", "B"}:
        raise ValueError(f"the file has lora_{next(iter(pair))} alone. Save all of loralib.lora_state_dict.")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or not b.shape[1] or len(a) % b.shape[1]:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not fit.")
    is_plain = len(a) == b.shape[1]
    return FileFactors(LoRA(b.shape[1]), _LAYOUT if is_plain else _MERGED, {"a": a, "b": b}, has_norm=is_plain)
