"""MonteCLoRA in PEFT's files: a LoRA with what its distribution is made of beside it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.tensors import Tensors
from jlora.methods import MonteCLoRA

_SAMPLER = "lora_monteclora_sampler"
_STATE = (f".{_SAMPLER}.expert_weights", f".{_SAMPLER}.gaussian_var_prior")  # of the last step; drawn anew


def without_state(config: Config, tensors: Tensors) -> Tensors:
    """The tensors without those that the next step of training draws."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_STATE)}


def monteclora_method(config: Config, fields: Mapping[str, Any]) -> MonteCLoRA:
    """The method of a configuration.

    Arguments:
        config: the configuration.
        fields: those of the LoRA: rank, alpha, rank_stabilized and dropout.
    """
    options = config["monteclora_config"]
    if "num_samples" not in options:
        raise ValueError(f"monteclora_config = {options} lacks num_samples: add it to the file.")
    return MonteCLoRA(**fields, samples=options["num_samples"], sample_scale=options.get("sample_scaler", 1e-4))


def add_monteclora(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Adds the tensors of the last step as they are at the start, and gives the field of the configuration."""
    samples = shared_field(entries, "samples")
    for name, entry in entries.items():
        rank = entry.factors.method.rank if isinstance(entry.factors.method, MonteCLoRA) else 0
        tensors[f"{PREFIX}{name}{_STATE[0]}"] = np.full(samples, 1 / samples, np.float32)
        tensors[f"{PREFIX}{name}{_STATE[1]}"] = np.eye(rank, dtype=np.float32)
    return {"monteclora_config": {"num_samples": samples, "sample_scaler": shared_field(entries, "sample_scale")}}
