"""Which modules a configuration of PEFT adapts, and which it trains in full, by PEFT's own matching rules."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jlora.io.peft.config import Config


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches a module.

    A pattern matches at the end of a name, and begins at the start of one of its parts.

    Arguments:
        patterns: `rank_pattern` or `alpha_pattern`.
        name: of the module.
        default: for a module that no pattern matches.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The `rank_pattern` or `alpha_pattern` for the modules that differ: each matches that module and no other."""
    patterns = {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
    return dict(sorted(patterns.items()))


def exact_endings(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    r"""The pattern of C3A and FourierFT, which PEFT matches by `.*\.(pattern)$`, and else compares with the name.

    A look-behind matches what is before the last dot. A name without a dot is itself the pattern; it would match the
    ends of others, so these have patterns of their own, and a file has patterns in alphabetical order: "(" is first.
    """
    patterns = {}
    for name, value in values.items():
        before, dot, last = name.rpartition(".")
        is_ending = any("." not in other and values[other] != default and last == other for other in values)
        if value != default or (dot and is_ending):
            patterns[rf"(?<=^{re.escape(before)}\.){re.escape(last)}" if dot else name] = value
    return dict(sorted(patterns.items()))


def exact_targets(modules: list[str], known: Iterable[str]) -> list[str] | str:
    """Modules as a list, or as one expression for whole names if the list, of endings, matches other modules too.

    Arguments:
        modules: that are adapted.
        known: all modules of the map.
    """
    is_ambiguous = any(_matches(modules, name) for name in known if name not in modules)
    return "|".join(map(re.escape, modules)) if is_ambiguous else modules


def is_target(config: Config, name: str) -> bool:
    """Whether the configuration adapts a module; False if that depends on torch's classes ("all-linear")."""
    targets = config["target_modules"]
    if targets is None or targets == "all-linear":
        return False
    if config.get("exclude_modules") and _matches(config["exclude_modules"], name):
        return False
    if is_saved(config, name) or not _is_in_layers(config, name):
        return False
    return _matches(targets, name)


def _is_in_layers(config: Config, name: str) -> bool:
    """Whether a module is in one of `layers_to_transform`, if the configuration has them."""
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(config["target_modules"], str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns]
    layer = next((int(match[1]) for match in matches if match), None)
    return layer in ([layers] if isinstance(layers, int) else layers)


def is_target_parameter(config: Config, name: str) -> bool:
    """Whether the configuration adapts a parameter."""
    return _matches(config.get("target_parameters"), name)


def is_feedforward(config: Config, name: str) -> bool:
    """Whether IA3 scales the input of a module, and not its output."""
    return _matches(config["feedforward_modules"], name, separator="")


def is_saved(config: Config, name: str) -> bool:
    """Whether a module or parameter is trained in full (`modules_to_save`)."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or ())


def trained_tokens(config: Config) -> list[int] | dict[str, list[int]] | None:
    """The trained tokens: a list for the only embedding, or a list for each embedding by name."""
    return config.get("trainable_token_indices") or config.get("token_indices")


def tokens_of(config: Config, name: str) -> list[int]:
    """The trained tokens of one module; empty if it has none."""
    tokens = trained_tokens(config)
    if isinstance(tokens, dict):
        tokens = next((rows for key, rows in tokens.items() if name == key or name.endswith(f".{key}")), None)
    return tokens or []


def _matches(targets: str | Iterable[str] | None, name: str, separator: str = ".") -> bool:
    """Whether a name is among targets: a regular expression for the whole name, or a list of endings."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(separator + target) for target in targets or ())
