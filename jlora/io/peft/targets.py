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
    if is_left_out(config, name) or not _matches(targets, name):
        return False
    return isinstance(targets, str) or name in targets or _is_in_layers(config, name)


def _is_in_layers(config: Config, name: str) -> bool:
    """Whether a module is in one of `layers_to_transform`, if the configuration has them."""
    layers = config.get("layers_to_transform")
    if layers in (None, []):
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    matches = [re.match(rf"{expression}\.(?P<layer>\d+)\.", name) for expression in expressions]
    layer = next((int(match["layer"]) for match in matches if match), None)
    return layer in ([layers] if isinstance(layers, int) else layers)


def is_target_parameter(config: Config, name: str) -> bool:
    """Whether the configuration adapts a parameter."""
    return _matches(config.get("target_parameters"), name)


def is_feedforward(config: Config, name: str) -> bool:
    """Whether IA3 scales the input of a module, and not its output."""
    return _matches(config["feedforward_modules"], name, separator="")


def is_saved(config: Config, module: str) -> bool:
    """Whether a module is trained in full, or is in one that is; PEFT compares the endings of names."""
    parts = module.split(".")
    names = [".".join(parts[: k + 1]) for k in range(len(parts))]
    return any(name.endswith(saved) for name in names for saved in config.get("modules_to_save") or ())


def is_left_out(config: Config, name: str) -> bool:
    """Whether PEFT adapts no module of this name because of `modules_to_save`, which are expressions here."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or ())


def check_endings(config: Config, modules: Iterable[str], adapted: Iterable[str]) -> None:
    """Raises if PEFT would train other modules in full, or rows of others, than a configuration that is written names.

    Arguments:
        config: the configuration, with the whole names of modules.
        modules: all modules of the map.
        adapted: those with an adapter.

    Raises:
        ValueError: if the name of another module ends with one of them, or an adapted module is in one of them.
    """
    named = {*(config.get("modules_to_save") or ()), *(config.get("trainable_token_indices") or ())}
    others = sorted(name for name in modules if name not in named and name.endswith(tuple(named)))
    others += sorted(name for name in adapted if name not in others and is_left_out(config, name))
    if others:
        raise ValueError(
            f"The adapter trains {sorted(named)} in full or by rows, and PEFT, which compares endings of names, would "
            f"also take {others}: leave the former out of the adapter, or save it by jlora.save."
        )


def trained_tokens(config: Config) -> list[int] | dict[str, list[int]] | None:
    """The trained tokens: a list for the only embedding, or a list for each embedding by name."""
    return config.get("trainable_token_indices") or config.get("token_indices")


def tokens_of(config: Config, name: str) -> list[int]:
    """The trained tokens of one module; empty if it has none."""
    tokens = trained_tokens(config)
    if isinstance(tokens, dict):
        tokens = tokens.get(name, next((rows for key, rows in tokens.items() if name.endswith(key)), None))
    return tokens or []


def _matches(targets: str | Iterable[str] | None, name: str, separator: str = ".") -> bool:
    """Whether a name is among targets: a regular expression for the whole name, or a list of endings."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(separator + target) for target in targets or ())
