"""PEFT's `adapter_config.json`: what each field means here, and which are refused."""

import collections
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.methods import IA3, DoRA, LoHa, LoKr, LoRA, VeRA
from jlora.methods._base import Method

Config = dict[str, Any]

PREFIX = "base_model.model."  # of every module in a file

# Fields that say nothing about what a trained adapter computes.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("runtime_config", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "init_weights", "init_ia3_weights", "fan_in_fan_out", "d_initial"),
}
# Fields of all types that are read.
_COMMON = {
    *("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias"),
}
# Fields that are read beside those, by type.
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
_NEEDED = {
    "LORA": ("r", "lora_alpha"),
    "LOHA": ("r", "alpha"),
    "LOKR": ("r", "alpha"),
    "VERA": ("r", "projection_prng_key"),
    "IA3": ("feedforward_modules",),
    "TRAINABLE_TOKENS": ("token_indices",),
}
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base as it is
# What fields hold that are more than a number or a switch: their type, and that of what is in them.
_HOLDS: dict[str, tuple[tuple[type, ...], type]] = {
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
_EXPRESSIONS = ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save")
TYPES = {"LoRA": "LORA", "DoRA": "LORA", "LoHa": "LOHA", "LoKr": "LOKR", "VeRA": "VERA", "IA3": "IA3"}


def read(path: str | os.PathLike[str]) -> Config:
    """The configuration in a file.

    Raises:
        ValueError: where it is damaged, lacks a field, or says what jlora does not implement, by name.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(f"{path} has the peft_type {kind!r}; jlora reads {', '.join(_READ)}.")
    _check_types(path, config)
    missing = [field for field in (*_NEEDED[kind], "target_modules") if field not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, and jlora takes no default for it.")
    unknown = [f"{name} = {v!r}" for name, v in config.items() if v and name not in {*_IDLE, *_COMMON, *_READ[kind]}]
    if unknown:
        raise ValueError(f"{path} says what jlora does not implement: {'; '.join(unknown)}.")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        converted = "model.save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        what = "the model that LoftQ left, merged" if start == "loftq" else f"it there as a plain LoRA: {converted}"
        raise ValueError(
            f"{path} has init_lora_weights = {start!r}: PEFT changes the base when it loads that. Save {what}."
        )
    if kind == "VERA" and not config.get("save_projection", True):
        raise ValueError(
            f"{path} has save_projection = False: its matrices are to be drawn by torch's generator, which jlora does "
            "not have. Save it with save_projection=True."
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only", "vera_only"):
        raise ValueError(f"{path} has bias = {config['bias']!r}; it is none, all, lora_only or vera_only.")
    return config


def _check_types(path: Any, config: Config) -> None:
    """Raises for a field that does not hold what PEFT puts there."""
    for name, (types, inner) in _HOLDS.items():
        value = config.get(name)
        items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        if name == "trainable_token_indices" and isinstance(value, dict):
            items = [k for one in items for k in (one if isinstance(one, list) else [None])]
        if value is not None and not (isinstance(value, types) and all(isinstance(item, inner) for item in items)):
            raise ValueError(f"{path} has {name} = {value!r}, which PEFT does not write.")
        expressions = list(value or ()) if name in _EXPRESSIONS and not isinstance(value, str) else []
        for expression in [*expressions, *([value] if isinstance(value, str) else [])]:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{path} has {name} = {value!r}, which is no regular expression: {error}") from error


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What the first matching pattern says of a module, as PEFT reads them: whole parts of a name, at its end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def method(config: Config, name: str) -> Method:
    """The method of a module.

    Raises:
        ValueError: where a number is none, or makes no sense.
    """
    kind = config["peft_type"]
    if kind == "IA3":
        return IA3("in" if _ends(config["feedforward_modules"], name, "") else "out")
    rank = by_pattern(config.get("rank_pattern"), name, config["r"])
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"The rank of {name} is a whole number, not {rank!r}.")
    if kind == "VERA":
        start, dropout = (_number(config.get(field, 0.0), field) for field in ("d_initial", "vera_dropout"))
        return VeRA(rank, start, config["projection_prng_key"], dropout)
    alpha = by_pattern(config.get("alpha_pattern"), name, config["lora_alpha" if kind == "LORA" else "alpha"])
    alpha = _number(alpha, f"alpha of {name}")
    if kind == "LORA":
        make = DoRA if config.get("use_dora") else LoRA
        dropout = _number(config.get("lora_dropout", 0.0), "lora_dropout")
        return make(rank, alpha, bool(config.get("use_rslora")), dropout=dropout)
    if kind == "LOHA":
        return LoHa(rank, alpha)
    return LoKr(rank, alpha, config.get("decompose_factor", -1), bool(config.get("decompose_both")))


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The {what} is a number, not {value!r}.")
    return float(value)


def rank(method: Method) -> int | None:
    """A method's rank, where it has one."""
    return getattr(method, "rank", None)


def token_rows(config: Config) -> Any:
    """The trained tokens: a list for the only embedding, or a dict from embeddings to lists."""
    return config.get("trainable_token_indices") or config.get("token_indices")


def is_saved(config: Config, name: str) -> bool:
    """Whether a module or parameter is among those that are trained whole."""
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or ())


def _ends(targets: str | Iterable[str] | None, name: str, dot: str = ".") -> bool:
    """Whether a name is among targets: a regular expression for the whole, or a list of ends."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(name == t or name.endswith(dot + t) for t in targets or ())


def targets(config: Config, name: str) -> bool:
    """Whether the configuration says that a module is adapted; where that depends on torch, whether it may be."""
    wanted = config["target_modules"]
    if wanted is None or wanted == "all-linear":
        return False
    if config.get("exclude_modules") and _ends(config["exclude_modules"], name):
        return False
    if is_saved(config, name):
        return False
    layers = config.get("layers_to_transform")
    if layers not in (None, []) and not isinstance(wanted, str):
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns]
        index = next((int(m[1]) for m in found if m), None)
        if index not in ([layers] if isinstance(layers, int) else layers):
            return False
    return _ends(wanted, name)


def targets_parameter(config: Config, name: str) -> bool:
    """Whether the configuration says that a parameter is adapted."""
    return _ends(config.get("target_parameters"), name)


def commonest(values: Iterable[Any]) -> Any:
    counts = collections.Counter(values)
    return min(counts, key=lambda v: (-counts[v], v))


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern for every module that differs, which matches that module and no other."""
    escaped = {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
    return dict(sorted(escaped.items()))


def number(value: float) -> int | float:
    """A whole number as one."""
    return int(value) if float(value).is_integer() else float(value)


def write(path: str | os.PathLike[str], config: Config) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2, sort_keys=True)
