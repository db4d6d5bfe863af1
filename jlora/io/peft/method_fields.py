"""The method of each module from the fields of a configuration, and those fields from the methods."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.io.peft.adalora import adalora_method
from jlora.io.peft.config import Config
from jlora.io.peft.form_methods import method_of_blocks, method_of_form, super_tuning
from jlora.io.peft.glora import glora_method
from jlora.io.peft.lokr import decompose_factor
from jlora.io.peft.lora_variants import variant_of
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.monteclora import monteclora_method
from jlora.io.peft.targets import by_pattern, exact_patterns, is_feedforward
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.methods import IA3, BDLoRA, DoRA, KaSA, LoHa, LoKr, LoRA, MonteCLoRA, PVeRA, RandLoRA, VeRA
from jlora.methods._base import Method


def method_of(config: Config, name: str) -> Method | None:
    """The method of a module; None if AdaLoRA has left it no rank.

    Raises:
        ValueError: if a rank, an alpha or a dropout is not a number that makes sense.
    """
    match config["peft_type"]:
        case "SUPERTUNING":
            return super_tuning(config, _number)
        case "TINYLORA" | "VBLORA" | "UNILORA" | "PEANUT":
            return method_of_form(config, _rank(config, name), _number)
        case "GRALORA" | "OSF" | "FROD":
            return method_of_blocks(config, _number)
        case "RANDLORA":
            return RandLoRA(
                config["r"],
                _number(config["randlora_alpha"], "randlora_alpha"),
                config.get("projection_prng_key", 0),
            )
        case "GLORA":
            return glora_method(config)
        case "IA3":
            return IA3("in" if is_feedforward(config, name) else "out")
        case "PVERA":
            start, dropout = (_number(config.get(field, 0.0), field) for field in ("d_initial", "pvera_dropout"))
            return PVeRA(_rank(config, name), start, config["projection_prng_key"], dropout)
        case "VERA":
            start, dropout = (_number(config.get(field, 0.0), field) for field in ("d_initial", "vera_dropout"))
            return VeRA(_rank(config, name), start, config["projection_prng_key"], dropout)
        case "ADALORA":
            return adalora_method(config, name)
        case "LOHA":
            return LoHa(_rank(config, name), _alpha(config, name, "alpha"))
        case "LOKR":
            factor, decompose_both = config.get("decompose_factor", -1), bool(config.get("decompose_both"))
            return LoKr(_rank(config, name), _alpha(config, name, "alpha"), factor, decompose_both, split="peft")
        case _:
            rank, alpha = _rank(config, name), _alpha(config, name, "lora_alpha")
            dropout = _number(config.get("lora_dropout", 0.0), "lora_dropout")
            if config.get("monteclora_config") and config.get("use_dora"):
                raise ValueError("The configuration sets monteclora_config and use_dora: PEFT takes one of them.")
            if config.get("monteclora_config"):
                lora = {"rank": rank, "alpha": alpha, "rank_stabilized": bool(config.get("use_rslora"))}
                return monteclora_method(config, lora | {"dropout": dropout})
            method_class = DoRA if config.get("use_dora") else LoRA
            method = method_class(rank, alpha, bool(config.get("use_rslora")), dropout=dropout)
            return variant_of(config, name, method)


def _rank(config: Config, name: str) -> int:
    rank = by_pattern(config.get("rank_pattern"), name, config["r"])
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"The rank of {name} must be a positive integer; the configuration has {rank!r}.")
    return rank


def _alpha(config: Config, name: str, field: str) -> float:
    return _number(by_pattern(config.get("alpha_pattern"), name, config[field]), f"alpha of {name}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The {what} must be a number; the configuration has {value!r}.")
    return float(value)


def rank_fields(entries: Mapping[str, ModuleEntry]) -> Config:
    """The fields of LoRA, DoRA, LoHa and LoKr; ranks and alphas that most modules have are the default."""
    methods = [entry.factors.method for entry in entries.values()]
    stabilized = all(getattr(method, "rank_stabilized", False) for method in methods)
    ranks = {name: _saved_rank(entry) for name, entry in entries.items()}
    alphas = {name: _as_int(_saved_alpha(entry, ranks[name], stabilized)) for name, entry in entries.items()}
    # PEFT reads the default for parameters, so theirs is the default if there are any.
    defaulted = [name for name, entry in entries.items() if entry.location.module.kind == "parameter"] or list(entries)
    rank, alpha = (_most_common(values[name] for name in defaulted) for values in (ranks, alphas))
    fields = {
        "r": rank,
        "rank_pattern": exact_patterns(ranks, rank),
        "alpha_pattern": exact_patterns(alphas, alpha),
        "modules_to_save": None,
    }
    if isinstance(methods[0], (LoRA, DoRA, MonteCLoRA, BDLoRA, KaSA)):
        return fields | {
            "bias": "none",
            "fan_in_fan_out": is_flipped(entries),
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_dropout": shared_field(entries, "dropout"),
            "use_dora": isinstance(methods[0], DoRA),
            "use_rslora": stabilized,
        }
    fields |= {"alpha": alpha, "init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0}
    if isinstance(methods[0], LoKr):
        fields["decompose_both"] = shared_field(entries, "decompose_both")
        fields["decompose_factor"] = decompose_factor(entries)
    return fields | {"use_effective_conv2d": False}


def ia3_fields(entries: Mapping[str, ModuleEntry]) -> Config:
    """The fields of IA3. PEFT matches `feedforward_modules` by endings, or by one expression for the whole name."""
    scale_input = [name for name, entry in entries.items() if entry.factors.has_axis("channels")]
    others = [name for name in entries if name not in scale_input]
    is_ambiguous = any(name.endswith(ending) for ending in scale_input for name in others)
    expression = "|".join(name.replace(".", r"\.") for name in sorted(scale_input))
    return {
        "fan_in_fan_out": is_flipped(entries),
        "feedforward_modules": expression if is_ambiguous else sorted(scale_input),
        "init_ia3_weights": True,
        "modules_to_save": None,
    }


def is_unscaled(factors: ModuleFactors) -> bool:
    """Whether jlora's method has no scale and PEFT multiplies by alpha / rank: LoKr, if no factor has low rank."""
    is_low_rank = factors.has_axis("rank") or factors.has_axis("major_rank")
    return isinstance(factors.method, LoKr) and not is_low_rank


def is_flipped(entries: Mapping[str, ModuleEntry]) -> bool:
    """Whether some modules hold their weight as (in, out): PEFT's `fan_in_fan_out`."""
    return any(entry.location.module.kind == "conv1d" for entry in entries.values())


def _saved_rank(entry: ModuleEntry) -> int:
    method = entry.factors.method
    rank = getattr(method, "rank", None)
    if isinstance(method, LoKr) and rank is None:  # so that PEFT keeps both factors whole, too
        n_out = entry.factors.arrays["d"].shape[-1]
        return max(n_out, entry.factors.arrays["d"].size // n_out)
    return rank or 0


def _saved_alpha(entry: ModuleEntry, rank: int, stabilized: bool) -> float:
    """The numerator of PEFT's scale, which always has one: alpha / rank, or alpha / sqrt(rank) if stabilized."""
    method, scale = entry.factors.method, entry.factors.scale
    if is_unscaled(entry.factors):
        return scale * rank
    alpha = getattr(method, "alpha", None)
    if alpha is None:
        return scale * (math.sqrt(rank) if stabilized else rank)
    divides_by_root = getattr(method, "rank_stabilized", False) and not stabilized
    return alpha * scale * (math.sqrt(rank) if divides_by_root else 1)


def _most_common(values: Iterable[Any]) -> Any:
    """The value that occurs most often; of several the smallest."""
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _as_int(value: float) -> int | float:
    """An integral number as an int, any other as a float."""
    return int(value) if float(value).is_integer() else float(value)
