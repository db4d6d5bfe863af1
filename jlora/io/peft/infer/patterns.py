"""One entry of a map for many parameters whose paths differ in numbers alone."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from jlora.io.peft.infer.templates import LETTERS, Template, fit, render, split_numbers, used_indices, varying
from jlora.io.torch.module_names import Entry, Module, compile_pattern, entry_of


@dataclasses.dataclass(frozen=True)
class ExactEntry:
    """The modules of one parameter, with the indices of its stack as the only ones.

    Arguments:
        templates: the names of the modules, one for each that is concatenated in the parameter.
        modules: the same, with all that is not a name.
        tied: the template of the output head that shares the weight, if there is one.
    """

    templates: tuple[Template, ...]
    modules: tuple[Module, ...]
    tied: Template | None = None

    def rendered(self, letters: Sequence[str]) -> Entry:
        """The entry of a map, with a letter for each index."""
        tied = None if self.tied is None else render(self.tied, letters)
        named = zip(self.templates, self.modules, strict=True)
        return entry_of([dataclasses.replace(m, name=render(template, letters), tied=tied) for template, m in named])


def templates_of(entries: Mapping[str, ExactEntry]) -> dict[str, Entry]:
    """A map with one entry for many paths that differ in numbers alone, if their modules follow a rule.

    Arguments:
        entries: by path.
    """
    alike: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    groups: dict[object, list[str]] = collections.defaultdict(list)
    for path, entry in entries.items():
        alike[split_numbers(path)[0]].append(path)
        groups[split_numbers(path)[0], tuple(_texts(template) for template in entry.templates)].append(path)
    rendered = {}
    for paths in groups.values():
        common = _common_template(paths, entries)
        others = set(alike[split_numbers(paths[0])[0]]) - set(paths)
        if common is None or any(compile_pattern(pattern).fullmatch(path) for pattern in common for path in others):
            common = {path: entries[path].rendered(LETTERS) for path in paths}
        rendered |= common
    return rendered


def _texts(template: Template) -> tuple[str, ...]:
    return tuple(part for part in template if isinstance(part, str))


def _common_template(paths: Sequence[str], entries: Mapping[str, ExactEntry]) -> dict[str, Entry] | None:
    """The one entry for some paths; None if their modules follow no rule."""
    exact, numbers = [entries[path] for path in paths], [split_numbers(path)[1] for path in paths]
    if len(paths) == 1 or len({(entry.modules, entry.tied is None) for entry in exact}) > 1:
        return None
    holes = varying(numbers)
    at = [tuple(row[slot] for slot in holes) for row in numbers]
    columns = [*zip(*(entry.templates for entry in exact), strict=True)]
    tied = [entry.tied for entry in exact if entry.tied is not None]
    merged = [_merge(dict(zip(at, column, strict=True))) for column in (*columns, *([tied] if tied else []))]
    templates = [template for template in merged if template and len(used_indices(template)) >= len(holes)]
    if len(templates) < len(merged):
        return None
    entry = ExactEntry(tuple(templates[: len(columns)]), exact[0].modules, templates[-1] if tied else None)
    return {_pattern(paths[0], holes): entry.rendered(LETTERS)}


def _pattern(path: str, holes: Sequence[int]) -> str:
    """A path with letters for some of its numbers."""
    texts, numbers = split_numbers(path)
    slots = ["{" + LETTERS[holes.index(k)] + "}" if k in holes else str(n) for k, n in enumerate(numbers)]
    return "".join(itertools.chain(*itertools.zip_longest(texts, slots, fillvalue="")))


def _merge(templates: Mapping[tuple[int, ...], Template]) -> Template | None:
    """Templates for several numbers in a path as one, whose first indices are those numbers."""
    stack = max((len(p.coefficients) for t in templates.values() for p in t if not isinstance(p, str)), default=0)
    corners = list(itertools.product(range(3), repeat=stack))
    names = {(*at, *corner): _at(template, corner) for at, template in templates.items() for corner in corners}
    return fit(names)


def _at(template: Template, index: tuple[int, ...]) -> str:
    """The name at an index."""
    return "".join(part if isinstance(part, str) else str(part.at(index)) for part in template)
