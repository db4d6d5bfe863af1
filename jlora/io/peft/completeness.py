"""Checks that a file of PEFT holds all that its configuration names, and nothing else."""

from jlora.io.peft.config import Config
from jlora.io.peft.plain_forms import parameter_of
from jlora.io.peft.targets import is_saved, is_target, is_target_parameter, trained_tokens
from jlora.io.torch.weight_location import Owners, module_of


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
    targets, saved = (
        _named_targets(config, owners),
        {name for name in owners if is_saved(config, module_of(name, owners))},
    )
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
    if config["peft_type"] in ("TRAINABLE_TOKENS", "BEFT"):
        return set()
    parameters = {name for name, weights in owners.items() if weights[0].location.module.kind == "parameter"}
    modules = {
        name
        for name in owners
        if name not in parameters and (is_target(config, name) or parameter_of(config, name) != name)
    }
    return modules | {name for name in parameters if is_target_parameter(config, name)}
