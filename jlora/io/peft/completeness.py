"""Checks that a file of PEFT holds all that its configuration names, and nothing else."""

from collections.abc import Mapping

import numpy as np

from jlora._trace.sites import Sites
from jlora.io.peft.config import Config
from jlora.io.peft.method_fields import method_of
from jlora.io.peft.targets import is_saved, is_target, is_target_parameter, trained_tokens
from jlora.io.peft.tensors import Tensors
from jlora.io.torch.weight_location import Owners, WeightLocation

_TIED = (("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight"))  # transposes of each other


def tied_heads(
    adapters: Mapping[str, Tensors], locations: Mapping[str, WeightLocation], sites: Sites, config: Config
) -> set[str]:
    """The output heads that the file adapts together with the embedding that they are tied to.

    Arguments:
        adapters: for every adapted module its tensors by suffix.
        locations: of the weights that the map knows.
        sites: of the program.
        config: the configuration.

    Raises:
        ValueError: if the names or the file tie other weights than the program: jlora adapts every use of a weight.
    """
    heads = set()
    for path, location in locations.items():
        head, embedding = location.module.tied, location.first_modules[0]
        is_tied = sites[path].is_lookup and sites[path].is_product
        if head is not None and not is_tied:
            raise ValueError(f"The names tie {path} to {head}, and in the program it is no output head.")
        if not is_tied or not (embedding in adapters or head in adapters):
            continue
        if head is None or not _are_alike(config, adapters, embedding, head):
            raise ValueError(
                f"{path} is an embedding and the output head at once, and jlora adapts both uses alike; the file does "
                "not. Train with ensure_weight_tying=True and name the head, Module(..., 'embedding', tied='lm_head'), "
                "or untie them in the program."
            )
        heads.add(head)
    return heads


def _are_alike(config: Config, adapters: Mapping[str, Tensors], embedding: str, head: str) -> bool:
    """Whether the file has the same update for an embedding and for the head, whose weight is the transpose."""
    one, other = adapters.get(embedding, {}), adapters.get(head, {})
    is_equal = all(e in one and h in other and np.array_equal(one[e], other[h].T) for e, h in _TIED)
    return is_equal and method_of(config, embedding) == method_of(config, head)


def check_complete(config: Config, adapted: set[str], trained: set[str], tokens: set[str], owners: Owners) -> None:
    """Raises if the configuration names other modules than have tensors.

    Arguments:
        config: the configuration.
        adapted: the modules with an adapter in the file, without tied heads.
        trained: the parameters that the file has in full.
        tokens: the modules with trained rows.
        owners: of all modules that the map knows.

    Raises:
        ValueError: with the names that the file lacks, or has and the configuration does not name.
    """
    targets, saved = _named_targets(config, owners), {name for name in owners if is_saved(config, name)}
    missing = sorted((targets - adapted) | (saved - trained))
    if missing or bool(trained_tokens(config)) != bool(tokens):
        raise ValueError(
            f"The configuration names these, and the file lacks them: {missing or 'trained tokens'}. Save the adapter "
            "again with PEFT."
        )
    biases = {name for name in trained if name.endswith(".bias") and config.get("bias", "none") != "none"}
    missing_biases = sorted(_named_biases(config, adapted, owners) - trained)
    if missing_biases:
        raise ValueError(
            f"The configuration has bias = {config['bias']!r}, and the file lacks {missing_biases}: the trained biases "
            "are lost. Save the adapter again with PEFT, or set bias to 'none' if they were not trained."
        )
    surplus = sorted((trained - saved - biases) | (adapted - targets))
    if surplus and config["target_modules"] != "all-linear":
        raise ValueError(f"The file has tensors for {surplus}, which the configuration does not name.")


def _named_biases(config: Config, adapted: set[str], owners: Owners) -> set[str]:
    """The biases that the configuration trains, of those that the map knows."""
    match config.get("bias", "none"):
        case "none":
            return set()
        case "all":
            return {name for name in owners if name.endswith(".bias")}
        case _:
            return {f"{module}.bias" for module in adapted} & set(owners)


def _named_targets(config: Config, owners: Owners) -> set[str]:
    """The modules and parameters that the configuration adapts."""
    if config["peft_type"] == "TRAINABLE_TOKENS":
        return set()
    parameters = {name for name, weights in owners.items() if weights[0].location.module.kind == "parameter"}
    modules = {name for name in owners if name not in parameters and is_target(config, name)}
    return modules | {name for name in parameters if is_target_parameter(config, name)}
