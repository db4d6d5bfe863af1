"""Regular expressions that select parameters by their paths."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from jlora._tree.paths import closest_matches

_T = TypeVar("_T")


def select_by_pattern(paths: Iterable[str], targets: Mapping[str, _T | None]) -> dict[str, _T]:
    """For every path the value of the first pattern that matches it; None excludes the path.

    Raises:
        ValueError: if a pattern is not a regular expression, matches nothing, or is shadowed by earlier patterns.
    """
    paths, first = list(paths), dict[str, str]()
    for pattern in targets:
        try:
            matches = [path for path in paths if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is not a regular expression ({error}); '.*' stands for any characters."
            ) from error
        if not matches:
            raise ValueError(f"The pattern {pattern!r} matches no parameter; {_near(pattern, paths)}")
        if all(path in first for path in matches):
            raise ValueError(
                f"The pattern {pattern!r} is shadowed by an earlier pattern: {matches[0]} and all else that it matches "
                f"is taken by {first[matches[0]]!r}. Put the narrower pattern first."
            )
        for path in matches:
            first.setdefault(path, pattern)
    selected = {path: targets[first[path]] for path in paths if path in first}
    return {path: value for path, value in selected.items() if value is not None}


def _near(pattern: str, paths: list[str]) -> str:
    """What was probably meant by a pattern that matches no path, for errors."""
    if paths == [""]:
        return (
            "the parameters are one array without a path. If that is the input of a model, pass the model's parameters "
            "before it: jlora.trace(lambda model, x: model(x), model, x)."
        )
    partly = [path for path in paths if re.search(pattern, path)][:3]
    part = f" It matches a part of {', '.join(partly)}: '.*' stands for the rest." if partly else ""
    return (
        f"{closest_matches(pattern, paths)}. Patterns are regular expressions for the whole path; print(sites) shows "
        f"all.{part}"
    )
