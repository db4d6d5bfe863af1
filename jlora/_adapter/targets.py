"""Targets: which weights an adapter updates, and by which method."""

import re
from collections.abc import Mapping
from typing import TypeVar

from jlora._trace.sites import Sites
from jlora._tree.paths import closest_matches
from jlora.methods._base import Method

Targets = Mapping[str, Method | None] | Method
_T = TypeVar("_T")


def select_methods(sites: Sites, targets: Targets) -> dict[str, Method]:
    """The method of every path that the targets select.

    Raises:
        TypeError: if `sites` is not from `jlora.trace`, or a target is not a method.
        ValueError: as `select_by_pattern`, and if a single method has nothing to adapt.
    """
    if not isinstance(sites, Sites):
        raise TypeError(f"`sites` must come from jlora.trace, not {type(sites).__name__}.")
    for target in targets.values() if isinstance(targets, Mapping) else [targets]:
        if targets is None or not isinstance(target, Method | None):
            given = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
            raise TypeError(
                f"Targets are a method such as jlora.LoRA(rank=8), or a dict from patterns to methods, not {given}."
            )
    if isinstance(targets, Method):
        selected = {path: targets for path, site in sites.items() if site.is_product}
        if not selected:
            raise ValueError("No matmul or convolution of the program uses a parameter. print(sites) shows all.")
        return selected
    return select_by_pattern(sites, targets)


def select_by_pattern(sites: Sites, targets: Mapping[str, _T | None]) -> dict[str, _T]:
    """For every path the value of the first pattern that matches it; None excludes the path.

    Raises:
        ValueError: if a pattern is not a regular expression, matches nothing, or is shadowed by earlier patterns.
    """
    first: dict[str, str] = {}
    for pattern in targets:
        try:
            matches = [path for path in sites if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is not a regular expression ({error}); '.*' stands for any characters."
            ) from error
        if not matches:
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter; {closest_matches(pattern, sites)}. Patterns are "
                "regular expressions for the whole path; print(sites) shows all."
            )
        if all(path in first for path in matches):
            raise ValueError(
                f"The pattern {pattern!r} is shadowed by an earlier pattern: {matches[0]} and all else that it matches "
                f"is taken by {first[matches[0]]!r}. Put the narrower pattern first."
            )
        for path in matches:
            first.setdefault(path, pattern)
    selected = {path: targets[first[path]] for path in sites if path in first}
    return {path: value for path, value in selected.items() if value is not None}
