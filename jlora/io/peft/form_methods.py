"""The methods of PEFT's configurations whose files have forms of their own: see `forms.py`."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora.io.peft.config import Config
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.methods import OSF, FRoD, GraLoRA, PEANuT, SuperTuning, TinyLoRA, UniLoRA, VBLoRA
from jlora.methods._base import Method


def method_of_form(config: Config, rank: int, number: Callable[[Any, str], float]) -> Method:
    """The method of a configuration.

    Arguments:
        config: the configuration.
        rank: its rank.
        number: checks that a value is a number, and converts it.
    """
    match config["peft_type"]:
        case "TINYLORA":
            return TinyLoRA(rank, config["u"], dropout=number(config.get("tinylora_dropout", 0.0), "tinylora_dropout"))
        case "VBLORA":
            dropout = number(config.get("vblora_dropout", 0.0), "vblora_dropout")
            vectors, length, topk = config["num_vectors"], config["vector_length"], config.get("topk", 2)
            return VBLoRA(rank, vectors, length, topk, dropout=dropout, offset=False)
        case "UNILORA":
            dropout = number(config.get("unilora_dropout", 0.0), "unilora_dropout")
            return UniLoRA(rank, config["theta_d_length"], None, dropout=dropout, offset=False)
        case _:
            scaling = number(config.get("scaling", 1.0), "scaling")
            return PEANuT(rank, config.get("depth", 0), config.get("act_fn", "relu"), scaling)


def super_tuning(config: Config, number: Callable[[Any, str], float]) -> SuperTuning:
    """The method of a configuration of Super-Tuning, with a LoRA beside if it has a rank.

    Arguments:
        config, number: as for `method_of_form`.
    """
    rank, alpha = config.get("r"), config.get("lora_alpha")
    alpha = 2.0 * rank if rank and alpha is None else alpha
    sparsity = number(config["sparsity"], "sparsity")
    return SuperTuning(sparsity, config.get("select_top", True), rank, None if rank is None else number(alpha, "alpha"))


def _entries_of_peft(size: int, sparsity: float) -> int:
    """How many entries PEFT trains: 11 of 120 at the sparsity 0.9, because 1 - 0.9 is a little less than 0.1."""
    return int(size * (1 - sparsity))


def with_entries_of_peft(method: SuperTuning, size: int) -> SuperTuning:
    """The method with a sparsity of which jlora has as many entries as PEFT has of the given one.

    Arguments:
        method: the method.
        size: of the weight.
    """
    count = _entries_of_peft(size, method.sparsity)
    return (
        method if method.entries_of(size) == count else dataclasses.replace(method, sparsity=1 - (count + 0.5) / size)
    )


def sparsity_for_peft(entries: Mapping[str, ModuleEntry]) -> float:
    """A sparsity of which PEFT has as many entries in every module as these have.

    Raises:
        ValueError: if the sparsities differ, and no single one gives each module its number of entries.
    """
    counts = [
        (entry.location.count("in") * entry.location.count("out"), entry.factors.arrays["s"].size)
        for entry in entries.values()
    ]
    given = {
        entry.factors.method.sparsity for entry in entries.values() if isinstance(entry.factors.method, SuperTuning)
    }
    least, most = max(n / size for size, n in counts), min((n + 1) / size for size, n in counts)
    for sparsity in (*sorted(given), 1 - (least + most) / 2):
        if all(_entries_of_peft(size, sparsity) == n for size, n in counts):
            return sparsity
    return shared_field(entries, "sparsity")


def method_of_blocks(config: Config, number: Callable[[Any, str], float]) -> Method:
    """The method of a configuration of GraLoRA, of FRoD, or of OSF, whose rank the file has.

    Arguments:
        config, number: as for `method_of_form`.
    """
    if config["peft_type"] == "OSF":
        return OSF()
    if config["peft_type"] == "FROD":
        density, ridge, dropout = (
            number(config.get(field, default), field)
            for field, default in (("sparse_rate", 0.01), ("regularization_alpha", 1e-3), ("frod_dropout", 0.0))
        )
        return FRoD(density, ridge, "none", dropout=dropout)
    dropout = number(config.get("gralora_dropout", 0.0), "gralora_dropout")
    return GraLoRA(config["r"], config["gralora_k"], number(config["alpha"], "alpha"), dropout)


def osf_of_file(tensors: Mapping[str, np.ndarray]) -> OSF | None:
    """The OSF of a module's tensors: the configuration has how many singular values are not trained; None without any.

    Arguments:
        tensors: of the module, by suffix.
    """
    values = tensors.get("osf_svd_params.S_low")
    return OSF() if values is None else OSF(values.size) if values.size else None


def fields_of_blocks(entries: Mapping[str, ModuleEntry], flipped: bool) -> Config:
    """The fields of GraLoRA and OSF."""
    method = next(iter(entries.values())).factors.method
    fields: Config = {"init_weights": True, "modules_to_save": None}
    if isinstance(method, GraLoRA):
        return fields | {
            "alpha": shared_field(entries, "alpha") or method.rank,
            "bias": "none",
            "fan_in_fan_out": flipped,
            "gralora_dropout": shared_field(entries, "dropout"),
            "gralora_k": shared_field(entries, "k"),
            "hybrid_r": 0,
            "r": shared_field(entries, "rank"),
        }
    ranks = {name: _kept_rank(entry) for name, entry in entries.items()}
    patterns = {f"^{re.escape(name)}$": rank for name, rank in sorted(ranks.items())}
    return fields | {"effective_rank": None, "rank_pattern": patterns}


def _kept_rank(entry: ModuleEntry) -> int:
    """How many singular triples OSF does not train."""
    trained = entry.factors.arrays["s"].size
    return min(entry.factors.arrays["u"].size, entry.factors.arrays["v"].size) // trained - trained
