"""PEFT's `adapter_config.json`: reading, checking and writing it."""

import json
import os
import re
from typing import Any

from jlora.methods import IA3, DoRA, LoHa, LoKr, LoRA, VeRA
from jlora.methods._base import Method

Config = dict[str, Any]

PREFIX = "base_model.model."  # of every module in a file

PEFT_TYPES: dict[type[Method], str] = {
    LoRA: "LORA",
    DoRA: "LORA",
    LoHa: "LOHA",
    LoKr: "LOKR",
    VeRA: "VERA",
    IA3: "IA3",
}

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Fields that do not change what a trained adapter computes.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "init_weights", "init_ia3_weights", "fan_in_fan_out", "d_initial"),
}
# Fields that jlora reads for every type.
_COMMON = {
    *("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias"),
}
# Fields that jlora reads for one type.
_READ = {
    "LORA": [
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
        *("init_lora_weights", "trainable_token_indices", "target_parameters", "ensure_weight_tying"),
    ],
    "LOHA": ["r", "alpha", "rank_pattern", "alpha_pattern"],
    "LOKR": ["r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"],
    "VERA": ["r", "projection_prng_key", "save_projection", "vera_dropout"],
    "IA3": ["feedforward_modules"],
    "TRAINABLE_TOKENS": ["token_indices"],
}
_REQUIRED = {
    "LORA": ("r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
    "VERA": ("r", "projection_prng_key"),
    "IA3": ("feedforward_modules",),
    "TRAINABLE_TOKENS": ("token_indices",),
}
_UNCHANGED_BASE = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights
_BIASES = ("none", "all", "lora_only", "vera_only")
# The types of fields that are not a plain number or switch: of the value, and of the items in it.
_FIELD_TYPES: dict[str, tuple[tuple[type, ...], type]] = {
    "target_modules": ((str, list), str),
    "exclude_modules": ((str, list), str),
    "feedforward_modules": ((str, list), str),
    "layers_pattern": ((str, list), str),
    "layers_to_transform": ((int, list), int),
    "modules_to_save": ((list,), str),
    "target_parameters": ((list,), str),
    "token_indices": ((list,), int),
    "trainable_token_indices": ((list, dict), int),
    "rank_pattern": ((dict,), int),
    "alpha_pattern": ((dict,), object),
}
_LISTS_OF_EXPRESSIONS = ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save")


def read_config(path: str | os.PathLike[str]) -> Config:
    """The configuration in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, lacks a field, or has a field that jlora does not implement; the message
            names the field.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    return check_config(path, config)


def check_config(path: str | os.PathLike[str], config: Any) -> Config:
    """The same configuration, checked.

    Arguments:
        path: where it comes from, for errors.
        config: what JSON gave.

    Raises:
        ValueError: if it is no configuration, lacks a field, or has a field that jlora does not implement.
    """
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(peft_type, str) or peft_type not in _READ:
        raise ValueError(f"{path} has the peft_type {peft_type!r}; jlora reads {', '.join(_READ)}.")
    for name in _FIELD_TYPES:
        _check_type(path, name, config.get(name))
        _check_expressions(path, name, config.get(name))
    _check_fields(path, peft_type, config)
    _check_base(path, peft_type, config)
    return config


def write_config(path: str | os.PathLike[str], config: Config) -> None:
    """Writes a configuration, its fields in alphabetical order."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, sort_keys=True)


def _check_type(path: str | os.PathLike[str], name: str, value: Any) -> None:
    """Raises unless a field holds what PEFT writes there."""
    if value is None:
        return
    types, item_type = _FIELD_TYPES[name]
    if not (isinstance(value, types) and all(isinstance(item, item_type) for item in _items(name, value))):
        raise ValueError(
            f"{path} has {name} = {value!r}, which PEFT does not write: it must be a "
            f"{' or '.join(t.__name__ for t in types)}, with items of type {item_type.__name__}."
        )


def _items(name: str, value: Any) -> list[Any]:
    """The values in a list or a dict; of trained tokens by embedding those of all lists."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if name == "trainable_token_indices" and isinstance(value, dict):
        return [index for rows in items for index in (rows if isinstance(rows, list) else [None])]
    return items


def _check_expressions(path: str | os.PathLike[str], name: str, value: Any) -> None:
    """Raises unless the regular expressions in a field compile."""
    listed = list(value or ()) if name in _LISTS_OF_EXPRESSIONS else []
    for expression in [value] if isinstance(value, str) else listed:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{path} has {name} = {value!r}, which is no regular expression: {error}") from error


def _check_fields(path: str | os.PathLike[str], peft_type: str, config: Config) -> None:
    """Raises if a field is missing that the adapter depends on, or is set and not implemented."""
    missing = [field for field in (*_REQUIRED[peft_type], "target_modules") if field not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, and jlora takes no default for it: add it to the file.")
    readable = {*_IGNORED, *_COMMON, *_READ[peft_type]}
    unknown = [f"{name} = {value!r}" for name, value in config.items() if value and name not in readable]
    if unknown:
        raise ValueError(
            f"{path} sets fields that jlora does not implement: {'; '.join(unknown)}. Merge the adapter with PEFT and "
            "load the merged weights instead."
        )
    bias = config.get("bias", "none")
    if bias not in _BIASES:
        raise ValueError(f"{path} has bias = {bias!r}; it must be one of {', '.join(_BIASES)}.")


def _check_base(path: str | os.PathLike[str], peft_type: str, config: Config) -> None:
    """Raises if PEFT would need more than the file and the base: another base, or torch's random numbers."""
    start = config.get("init_lora_weights", True)
    if start not in _UNCHANGED_BASE:
        converted = "model.save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        what = "the model that LoftQ produced, merged" if start == "loftq" else f"it there as a plain LoRA: {converted}"
        raise ValueError(
            f"{path} has init_lora_weights = {start!r}: PEFT changes the base when it loads that. Save {what}."
        )
    if peft_type == "VERA" and not config.get("save_projection", True):
        raise ValueError(
            f"{path} has save_projection = False: its matrices are drawn by torch's generator, which jlora does not "
            "have. Save it with save_projection=True."
        )
