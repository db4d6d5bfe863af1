"""AdaLoRA in PEFT's files: `B diag(e) A` with a rank for each module, and a scale that the first rank determines."""

from typing import Any

from jlora.io.peft.config import Config
from jlora.methods import LoRA

_EPSILON = 1e-5  # PEFT adds it to the rank that it divides by


def adalora_method(config: Config, name: str) -> LoRA | None:
    """The LoRA that a module's AdaLoRA equals; None if its rank is 0.

    Raises:
        ValueError: if AdaLoRA does not write such a rank pattern, or if the file does not determine the scale.
    """
    first, alpha = _number(config, "init_r"), _number(config, "lora_alpha")
    pattern = config.get("rank_pattern") or {}
    kept = next((pattern[key] for key in (f"{name}.lora_E", f"{name}.lora_E.default") if key in pattern), None)
    if kept is not None and not (isinstance(kept, list) and all(isinstance(one, bool) for one in kept)):
        raise ValueError(f"The rank_pattern of {name} must say for each rank whether it is kept, and it is {kept!r}.")
    if alpha <= 0 and kept is not None:
        raise ValueError(
            f"The configuration has lora_alpha = {alpha:g} and a rank_pattern: PEFT then scales {name} differently in "
            "training and after loading. Merge the adapter with PEFT."
        )
    rank = int(first) if kept is None else sum(kept)
    scale = (alpha if alpha > 0 else first) / (first + _EPSILON)
    dropout = _number(config, "lora_dropout") if "lora_dropout" in config else 0.0
    return LoRA(rank, scale * rank, dropout=dropout) if rank else None


def _number(config: Config, field: str) -> float:
    value: Any = config[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The {field} must be a number; the configuration has {value!r}.")
    return float(value)
