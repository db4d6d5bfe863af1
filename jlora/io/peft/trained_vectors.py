"""PEFT's files of trained vectors alone: norms (LN-tuning) and biases (BEFT). jlora trains both by `Full`."""

from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.tensors import Tensors

_NORM = ".ln_tuning_layers."
_BIAS = ".beft_bias"


def norms_as_saved_modules(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """LN-tuning as modules that are saved in full, which it is.

    Raises:
        ValueError: if the configuration names the modules by an expression.
    """
    targets = config["target_modules"]
    if not isinstance(targets, list):
        raise ValueError(
            f"The configuration of LN-tuning names its modules by {targets!r}: write their names as a list, so that "
            "it is known whether the file has them all."
        )
    renamed = {name.replace(_NORM, "."): tensor for name, tensor in tensors.items()}
    saved = [*targets, *(config.get("modules_to_save") or ())]
    return config | {"modules_to_save": saved, "target_modules": []}, renamed


def biases_as_output_biases(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """BEFT's differences of biases, as those that a LoRA may add to the output of a module."""
    return config, {
        (f"{name.removesuffix(_BIAS)}.lora_B.bias" if name.endswith(_BIAS) else name): (
            np.reshape(tensor, -1) if name.endswith(_BIAS) else tensor
        )
        for name, tensor in tensors.items()
    }


def file_of_vectors(
    trained: Mapping[str, ModuleEntry], differences: Mapping[str, ModuleEntry]
) -> tuple[Config, Tensors] | None:
    """The configuration and tensors of trained norms or biases alone; None if there are others or both.

    Arguments:
        trained: the parameters of whole modules, by their own names, with their values.
        differences: those that the adapter has, with their differences from the base.
    """
    if any(entry.location.is_matrix for entry in differences.values()):
        return None
    fields: Config = {"inference_mode": True, "modules_to_save": None}
    norms = {name.removesuffix(".weight") for name in differences if name.endswith(".weight")}
    if not norms and all(name.endswith(".bias") for name in differences):
        by_module = {name.removesuffix(".bias"): _vector(entry) for name, entry in differences.items()}
        tensors = {f"{PREFIX}{module}{_BIAS}": vector[None] for module, vector in by_module.items()}
        return fields | {"init_weights": True, "peft_type": "BEFT", "target_modules": sorted(by_module)}, tensors
    if not all(name.rpartition(".")[0] in norms for name in differences):
        return None
    tensors = {}
    for name, entry in trained.items():
        module, _, parameter = name.rpartition(".")
        if module in norms:
            tensors[f"{PREFIX}{module}{_NORM}{parameter}"] = _vector(entry)
    return fields | {"peft_type": "LN_TUNING", "target_modules": sorted(norms)}, tensors


def _vector(entry: ModuleEntry) -> np.ndarray:
    value = entry.factors.arrays["d"]
    return np.ascontiguousarray(value * value.dtype.type(entry.factors.scale)).reshape(-1)
