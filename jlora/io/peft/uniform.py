"""LoRAs of one rank and one scale, for readers that take no others."""

from collections.abc import Mapping

from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.torch.join_modules import pad_rank, total_scale
from jlora.methods import LoRA


def check_vllm(adapted: Mapping[str, ModuleEntry], trained: Mapping[str, ModuleEntry]) -> None:
    """Raises if vLLM cannot serve an adapter.

    Raises:
        ValueError: with the modules that it cannot serve.
    """
    if trained:
        raise ValueError(
            f"vLLM takes LoRA alone, and no bias, modules_to_save or trained tokens: merge or leave out "
            f"{sorted(trained)}."
        )
    refused = sorted(name for name, entry in adapted.items() if entry.location.module.kind in ("conv", "parameter"))
    if refused:
        raise ValueError(f"vLLM takes LoRA of linear layers and embeddings: merge or leave out {refused}.")


def check_experts(experts: Mapping[str, ModuleEntry]) -> None:
    """Raises if PEFT's `target_parameters` cannot hold the updates of experts.

    Raises:
        ValueError: with the parameters that have another method than LoRA.
    """
    refused = {n: type(e.factors.method).__name__ for n, e in experts.items() if not isinstance(e.factors.method, LoRA)}
    if refused:
        listed = ", ".join(f"{name} ({method})" for name, method in sorted(refused.items()))
        raise ValueError(
            f"PEFT's target_parameters hold LoRA alone, not {listed}. Name a module for each expert "
            "instead, with an index for the experts such as 'experts.{e}.up_proj'; or convert updates of low rank by "
            "jlora.to_lora."
        )


def with_uniform_rank(entries: Mapping[str, ModuleEntry], reason: str, notes: list[str]) -> dict[str, ModuleEntry]:
    """LoRAs with the largest rank and scale of all: zeros fill up the ranks, and B takes what the scale lacks.

    Arguments:
        entries: the modules.
        reason: for the notes.
        notes: to which a sentence is added for every module that changes.
    """
    ranks = {name: e.factors.method.rank for name, e in entries.items() if isinstance(e.factors.method, LoRA)}
    scales = {name: total_scale(entries[name].factors) for name in ranks}
    rank, scale = max(ranks.values()), max(scales.values())
    if len(set(scales.values())) == len(set(ranks.values())) == 1:
        return dict(entries)
    uniform = {}
    for name, (location, factors) in entries.items():
        uniform[name] = ModuleEntry(location, pad_rank(factors, rank, scale))
        changes = [f"rank {ranks[name]} padded to {rank}"] if ranks[name] != rank else []
        if scales[name] != scale:
            changes.append(f"B times {scales[name] / scale:g}")
        if changes:
            notes.append(f"{name}: {', '.join(changes)}, since {reason}.")
    return uniform
