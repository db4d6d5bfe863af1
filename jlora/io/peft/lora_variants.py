"""LoRAs of PEFT with another structure, which its configuration asks for by a field: BD-LoRA, QA-LoRA and KaSA."""

import math
from collections.abc import Mapping
from typing import Any

from jlora.io.peft.config import Config
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.methods import BDLoRA, DoRA, KaSA, LoRA, QALoRA
from jlora.methods._base import Method

_PATTERNS = {"in": "target_modules_bd_a", "out": "target_modules_bd_b"}


def variant_of(config: Config, name: str, lora: LoRA | DoRA) -> Method:
    """The method of a module, by the fields beside those of LoRA.

    Arguments:
        config: the configuration.
        name: of the module.
        lora: the LoRA or DoRA that it would be without these fields.

    Raises:
        ValueError: if a field holds what PEFT does not write, or two of them are set.
    """
    chosen = [field for field in ("use_bdlora", "use_qalora", "kasa_config") if config.get(field)]
    if not chosen:
        return lora
    if len(chosen) > 1 or not isinstance(lora, LoRA):
        fields = ", ".join([*chosen, *["use_dora"] * (not isinstance(lora, LoRA))])
        raise ValueError(f"The configuration sets {fields}: PEFT takes one of them. Remove the others from the file.")
    rank, alpha = lora.rank, lora.alpha or float(lora.rank)
    match chosen[0]:
        case "use_qalora":
            return QALoRA(rank, config.get("qalora_group_size", 16), alpha, lora.rank_stabilized, lora.dropout)
        case "kasa_config":
            return KaSA(rank, alpha * (math.sqrt(rank) if lora.rank_stabilized else 1), lora.dropout)
        case _:
            blocks, side = _blocks(config["use_bdlora"], name)
            return BDLoRA(rank, blocks, side, alpha, lora.rank_stabilized, lora.dropout) if side else lora


def _blocks(fields: Any, name: str) -> tuple[int, str]:
    """The number of blocks, and the side of a module that has them, by its last name; "" if it is a plain LoRA."""
    if not isinstance(fields, dict):
        raise ValueError(f"The configuration has use_bdlora = {fields!r}; PEFT writes a table there.")
    last = name.rpartition(".")[2]
    sides = [side for side, field in _PATTERNS.items() if any(p in last for p in fields.get(field) or ())]
    if len(sides) > 1:
        raise ValueError(f"use_bdlora gives {name} two block-diagonal factors, by {fields}.")
    return fields.get("nblocks", 1), sides[0] if sides else ""


def with_pooling_of_peft(factors: ModuleFactors, n_in: int) -> ModuleFactors:
    """A QA-LoRA with PEFT's scale: it multiplies the mean of a group by in / group, and the paper by group."""
    method = factors.method
    assert isinstance(method, QALoRA)
    return ModuleFactors(method, n_in / method.group**2, factors.arrays, factors.axes)


def variant_fields(entries: Mapping[str, ModuleEntry]) -> Config:
    """The fields of a configuration beside those of LoRA.

    Raises:
        ValueError: if PEFT cannot tell the modules apart, whose last names it compares.
    """
    method = next(iter(entries.values())).factors.method
    if isinstance(method, KaSA):
        return {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
    if not isinstance(method, BDLoRA):
        return {}
    sides = {name: getattr(entry.factors.method, "side", "") for name, entry in entries.items()}
    fields: Config = {"match_strict": True, "nblocks": shared_field(entries, "blocks")}
    for side, field in _PATTERNS.items():
        fields[field] = sorted({name.rpartition(".")[2] for name in sides if sides[name] == side}) or None
    if any(_blocks(fields, name)[1] != side for name, side in sides.items()):
        raise ValueError(
            "PEFT tells the modules of BD-LoRA apart by parts of their last names, and these are not distinct: "
            f"{sides}. Convert the adapter by jlora.to_lora."
        )
    return {"use_bdlora": fields}
