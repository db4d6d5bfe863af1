"""PEFT's `adapter_config.json`: reading, checking and writing it."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

from jlora.io.peft.changed_base import FROM_BASE, FROM_FILE

Config = dict[str, Any]

PREFIX = "base_model.model."  # of every module in a file

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Fields that do not change what a trained adapter computes.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "init_weights", "init_ia3_weights", "fan_in_fan_out", "d_initial"),
    *("rank_dropout", "rank_dropout_scale", "module_dropout", "velora_config"),  # of training alone
    *("init_v_bound", "init_logits_std", "init_vector_bank_bound", "init_theta_d_bound"),
    *("progressbar", "runtime_offload_base_weight"),
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
        *("init_lora_weights", "trainable_token_indices", "target_parameters", "ensure_weight_tying", "lora_bias"),
        "monteclora_config",
        *("use_bdlora", "use_qalora", "kasa_config"),
    ],
    # PEFT gives AdaLoRA all fields of LoRA; those in the last three lines change nothing there.
    "ADALORA": [
        *("init_r", "lora_alpha", "rank_pattern", "lora_dropout", "trainable_token_indices", "ensure_weight_tying"),
        *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("r", "alpha_pattern", "use_rslora", "lora_bias", "init_lora_weights"),
    ],
    "LOHA": ["r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"],
    "LOKR": [
        *("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor", "use_effective_conv2d"),
    ],
    "VERA": ["r", "projection_prng_key", "save_projection", "vera_dropout"],
    "IA3": ["feedforward_modules"],
    "TRAINABLE_TOKENS": ["token_indices"],
    "TINYLORA": ["r", "u", "weight_tying", "projection_seed", "save_projection", "tinylora_dropout"],
    "VBLORA": ["r", "num_vectors", "vector_length", "topk", "vblora_dropout", "save_only_topk_weights"],
    "UNILORA": ["r", "theta_d_length", "proj_seed", "unilora_dropout", "save_indices"],
    "PEANUT": ["r", "depth", "act_fn", "scaling"],
    "PVERA": ["r", "projection_prng_key", "save_projection", "pvera_dropout", "sample_at_inference", "generator_seed"],
    "SUPERTUNING": ["sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "save_precomputed_indices"],
    "LN_TUNING": [],
    "BEFT": [],
    "OFT": [
        *("r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    ],
    # Dropouts act in training alone.
    "BOFT": ["boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"],
    "HRA": ["r", "apply_GS"],
    "ROAD": ["variant", "group_size"],
    "DEFT": ["r", "alpha", "decomposition_method", "para", "init_scale", "deft_dropout"],
    "GRALORA": ["r", "alpha", "gralora_k", "gralora_dropout"],
    "OSF": ["effective_rank", "rank_pattern"],
    # How many coefficients a module has, and the size of its blocks, are those of its tensors.
    "C3A": ["block_size", "block_size_pattern"],
    "FOURIERFT": ["n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed"],
    "WAVEFT": [
        *("n_frequency", "n_frequency_pattern", "proportional_parameters", "scaling", "random_loc_seed"),
        *("wavelet_family", "use_idwt"),
    ],
    "SHIRA": ["r", "mask_type", "random_seed"],  # the file has the places
    "HIRA": ["r", "rank_pattern", "hira_dropout"],
    "DELORA": ["r", "rank_pattern", "delora_lambda", "lambda_pattern"],  # the file has the bounds
    "MISS": ["r", "mini_r", "init_weights", "miss_dropout"],
    "RANDLORA": [
        *("r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
        "randlora_dropout",
    ],
    "GLORA": ["r", "config_A_B", "config_C", "config_D_E"],
    "FROD": ["sparse_rate", "regularization_alpha", "frod_dropout", "projection_prng_key", "save_projection"],
}
_REQUIRED = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
    "VERA": ("r", "projection_prng_key"),
    "IA3": ("feedforward_modules",),
    "TRAINABLE_TOKENS": ("token_indices",),
    "TINYLORA": ("r", "u"),
    "VBLORA": ("r", "num_vectors", "vector_length"),
    "UNILORA": ("r", "theta_d_length"),
    "PEANUT": ("r",),
    "PVERA": ("r", "projection_prng_key"),
    "SUPERTUNING": ("sparsity",),
    "LN_TUNING": (),
    "BEFT": (),
    "OFT": ("use_cayley_neumann", "oft_block_size"),  # files of PEFT before 0.14 lack both
    "BOFT": (),
    "HRA": (),
    "ROAD": ("variant", "group_size"),
    "DEFT": ("r",),
    "GRALORA": ("r", "alpha", "gralora_k"),
    "OSF": (),
    "C3A": (),
    "FOURIERFT": ("scaling", "random_loc_seed"),
    "WAVEFT": ("scaling", "random_loc_seed"),
    "SHIRA": ("r",),
    "FROD": ("sparse_rate",),
    "HIRA": (),
    "GLORA": ("r",),
    "DELORA": (),
    "MISS": (),
    "RANDLORA": ("r", "randlora_alpha"),
}
# Why a field is refused, and what to do, if there is more to say than that jlora does not implement it.
_REASONS = {
    "layer_replication": "the model has other layers than its base: give the program these layers, and merge with PEFT",
    "alora_invocation_tokens": "the adapter acts from certain tokens on, so no weight is equal to it, and PEFT cannot "
    "merge it either",
    "arrow_config": "a router chooses among several adapters for each token, so no weight is equal to it: load each of "
    "these, and see jlora.bank",
    "megatron_config": "the layers are Megatron's: save the adapter from a model of transformers",
}
# Why a type is refused, and what to do.
_TYPE_REASONS = {
    "PSOFT": " Its file holds a rotation in the basis of the singular vectors, and not their signs, which differ "
    "between builds of LAPACK: convert it to LoRA with PEFT.",
    "ADAMSS": " Its file does not hold the clusters, which PEFT computes again by scikit-learn: merge it with PEFT.",
}
_UNCHANGED_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")  # values of init_lora_weights
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
    "rank_pattern": ((dict,), object),  # OSF has fractions of the rank too
    "alpha_pattern": ((dict,), object),
    "n_frequency_pattern": ((dict,), object),
    "block_size_pattern": ((dict,), object),
    "monteclora_config": ((dict,), object),
}
_INTEGERS = ("projection_prng_key", "random_loc_seed", "num_cayley_neumann_terms", "qalora_group_size")
_LISTS_OF_EXPRESSIONS = (
    *("rank_pattern", "alpha_pattern", "n_frequency_pattern", "block_size_pattern", "layers_pattern"),
    "modules_to_save",
)


def read_config(path: str | os.PathLike[str], *, has_start: bool = False) -> Config:
    """The configuration in a file.

    Arguments:
        path: of the file.
        has_start: whether the adapter before training is at hand.

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
    config = check_config(path, config)
    if not has_start:
        check_start(path, config, (*_UNCHANGED_BASE, *FROM_BASE))
    return config


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
        reason = _TYPE_REASONS.get(str(peft_type), "")
        raise ValueError(f"{path} has the peft_type {peft_type!r}; jlora reads {', '.join(_READ)}.{reason}")
    for name in _FIELD_TYPES:
        _check_type(path, name, config.get(name))
        _check_expressions(path, name, config.get(name))
    _check_fields(path, peft_type, config)
    return config


def check_start(path: str | os.PathLike[str], config: Config, accepted: Iterable[str | bool] = _UNCHANGED_BASE) -> None:
    """Raises if the adapter is relative to a base that its start changed, and that base is not known.

    Arguments:
        path: where the configuration comes from, for errors.
        config: the configuration.
        accepted: the values of `init_lora_weights` that are accepted; by default those that leave the base as it is.

    Raises:
        ValueError: if the start is another one; the message says what to do.
    """
    start = config.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if config["peft_type"] != "LORA" or start in accepted:
        return
    if start == "loftq":
        what = "Set it to true in the file, and pass or merge with the base that LoftQ has quantised"
    elif start in FROM_BASE:
        what = "Load it by jlora.peft.load with params="
    elif start in FROM_FILE or str(start).startswith("pissa_niter_"):
        what = "Load it by jlora.peft.load(..., start=folder), the folder of the adapter before training"
    else:
        raise ValueError(
            f"{path} has init_lora_weights = {start!r}, which jlora does not know: if that leaves the base as it is, "
            "set it to true in the file; else save it with PEFT as a plain LoRA."
        )
    raise ValueError(
        f"{path} has init_lora_weights = {start!r}: PEFT changes the base, and the adapter is relative to the changed "
        f"base. {what}; or save it with PEFT as a plain LoRA: "
        "model.save_pretrained(..., path_initial_model_for_weight_conversion=...)."
    )


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
    if name == "rank_pattern":  # AdaLoRA's says of each rank whether it is kept
        return [item for rank in items for item in (rank if isinstance(rank, list) else [rank])]
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
    for name in _INTEGERS:
        if name in config and (isinstance(config[name], bool) or not isinstance(config[name], int)):
            raise ValueError(f"{path} has {name} = {config[name]!r}, and it must be an integer.")
    readable = {*_IGNORED, *_COMMON, *_READ[peft_type]}
    unknown = {name: value for name, value in config.items() if value and name not in readable}
    if unknown:
        reasons = {name: f" ({_REASONS[name]})" if name in _REASONS else "" for name in unknown}
        merge = " Merge the adapter with PEFT and load the merged weights instead."
        raise ValueError(
            f"{path} sets fields that jlora does not implement: "
            f"{'; '.join(f'{name} = {value!r}{reasons[name]}' for name, value in unknown.items())}."
            f"{'' if all(reasons.values()) else merge}"
        )
    bias = config.get("bias", "none")
    if bias not in ("none", "all") and not str(bias).endswith("_only"):  # PEFT tests the ending, "lora_only" and others
        raise ValueError(f"{path} has bias = {bias!r}; it must be none, all or {peft_type.lower()}_only.")
