"""How things are shown: tables as text and HTML, repeated layers as one row, short forms of arrays and dataclasses."""

import abc
import dataclasses
import html
import re
from collections.abc import Collection, Hashable, Sequence
from typing import Any

# ---- Tables


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a line of text below it.

    Arguments:
        head: the names of the columns.
        rows: the cells of every row.
        right: the columns that are aligned to the right.
        foot: the line of text.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[int] = ()
    foot: str = ""

    def text(self) -> str:
        """The table in plain text: aligned columns under a ruled head."""
        widths = [max(len(row[k]) for row in (self.head, *self.rows)) for k in range(len(self.head))]

        def line(row: Sequence[str]) -> str:
            pairs = zip(row, widths, strict=True)
            return "  ".join(c.rjust(w) if k in self.right else c.ljust(w) for k, (c, w) in enumerate(pairs)).rstrip()

        lines = [line(self.head), "  ".join("-" * w for w in widths), *map(line, self.rows)]
        return "\n".join([*lines, self.foot] if self.foot else lines)

    def html(self) -> str:
        """The table as HTML, for notebooks."""

        def row(cells: Sequence[str], tag: str) -> str:
            sides = ["right" if k in self.right else "left" for k in range(len(cells))]
            pairs = zip(cells, sides, strict=True)
            return (
                "<tr>" + "".join(f'<{tag} style="text-align: {s}">{html.escape(c)}</{tag}>' for c, s in pairs) + "</tr>"
            )

        body = "\n".join(row(cells, "td") for cells in self.rows)
        foot = f"\n<p>{html.escape(self.foot)}</p>" if self.foot else ""
        return f"<table>\n<thead>{row(self.head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{foot}"


class Tabular(abc.ABC):
    """What `print` and notebooks show as a table."""

    @abc.abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return self._table().text()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._table().html()


# ---- Repeated layers


def fold_layers(items: Sequence[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """Groups paths that differ in the numbers of their layers alone.

        layer_0/kernel, layer_1/kernel, layer_2/kernel  ->  layer_{0..2}/kernel

    Arguments:
        items: paths, and for each what paths of one group have in common.

    Returns:
        for every group the path with sets of numbers in braces, and the positions of its items. Groups are in the
        order of their first items.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for position, (path, key) in enumerate(items):
        # A number with leading zeros is a name: it does not count layers as the others do.
        parts = re.split(r"((?<!\d)(?:0|[1-9]\d*)(?!\d))", path)
        names, numbers = tuple(parts[::2]), tuple(frozenset([int(n)]) for n in parts[1::2])
        groups.setdefault((names, numbers, key), []).append(position)
    for place in range(max((len(names) - 1 for names, _, _ in groups), default=0)):
        groups = _fold_at(groups, place)
    return [(_braced(names, numbers), sorted(positions)) for (names, numbers, _), positions in groups.items()]


def _fold_at(groups: dict[tuple[Any, ...], list[int]], place: int) -> dict[tuple[Any, ...], list[int]]:
    """Joins groups whose paths differ in one place alone, and that have as many items."""
    alike: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for group, positions in groups.items():
        names, numbers, key = group
        others = numbers[:place] + numbers[place + 1 :]
        alike.setdefault((names, others, key, len(positions)), []).append(group)
    folded = {}
    for members in alike.values():
        names, numbers, key = members[0]
        if place < len(numbers):
            joined = frozenset().union(*(member[1][place] for member in members))
            numbers = (*numbers[:place], joined, *numbers[place + 1 :])
        folded[names, numbers, key] = [position for member in members for position in groups[member]]
    return folded


def _braced(names: tuple[str, ...], numbers: tuple[frozenset[int], ...]) -> str:
    ranges = [str(min(n)) if len(n) == 1 else f"{{{_ranges(sorted(n))}}}" for n in numbers]
    return "".join(part for pair in zip(names, [*ranges, ""], strict=True) for part in pair)


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of three and more as first..last: `0,2..5`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


# ---- Values


def short_bytes(count: int) -> str:
    """A number of bytes in its largest unit: `1.5 GiB`."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    unit = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 2 ** (10 * unit):.4g} {units[unit]}"


def short_count(count: Any) -> str:
    """A count in three digits, `1.23e+09`; one of symbolic sizes as its expression, `48*b`."""
    return f"{count:.3g}" if isinstance(count, (int, float)) else str(count)


def short_integer(count: Any) -> str:
    """A whole number with separators, `1,234,567`; one of symbolic sizes as its expression."""
    return f"{count:,}" if isinstance(count, int) else str(count)


def short_share(part: Any, total: Any, digits: int) -> str:
    """A part of a count in percent, "unknown" if it depends on symbolic sizes.

    Arguments:
        part, total: counts; the total is not zero.
        digits: how many to show after the point.
    """
    if isinstance(part, (int, float)) and isinstance(total, (int, float)):
        return f"{100 * part / total:.{digits}f}%"
    # The terms of both expressions are in one order, so the ratio can only be that of the first coefficients.
    first, second = _first_coefficient(part), _first_coefficient(total)
    return f"{100 * first / second:.{digits}f}%" if part * second == total * first else "unknown"


def _first_coefficient(count: Any) -> int:
    """12 of `12*b*s + 3*b`, 1 of `b*s`."""
    digits = re.match(r"(-?\d+)(?=\*|$)", str(count))
    return int(digits[1]) if digits else 1


def short_dtype(dtype: Any) -> str:
    """A dtype as in `f32`, `bf16`, `i8`, `bool`."""
    name = str(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("complex", "c"), ("uint", "u"), ("int", "i")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


def short(value: Any) -> str:
    """A value in few characters: an array as its dtype and shape, `f32[512, 8]`; others as they are."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{short_dtype(value.dtype)}{list(value.shape)}"
    return repr(value)


def short_call(instance: Any, always: Collection[str] = ()) -> str:
    """A dataclass as a call, with those fields that differ from their defaults: `LoRA(rank=8)`.

    Arguments:
        instance: the dataclass.
        always: names of fields that are shown even if they have their default.
    """
    values = {field: getattr(instance, field.name) for field in dataclasses.fields(instance) if field.repr}
    shown = [f"{f.name}={short(v)}" for f, v in values.items() if f.name in always or _differs(f, v)]
    return f"{type(instance).__name__}({', '.join(shown)})"


def short_arrays(instance: Any, first: str, spread: str, hidden: Collection[str] = ()) -> str:
    """A dataclass of arrays with their dtypes and shapes: `Update(LoRA(rank=8), a: f32[512, 8], b: f32[8, 512])`.

    Arguments:
        instance: the dataclass. A dict of arrays is shown as one entry for each array, `frozen c: f32[8]`.
        first: the field whose value comes first, without its name.
        spread: the dict whose entries are shown without its name.
        hidden: fields that are not shown.
    """
    parts = [repr(getattr(instance, first))]
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if field.name == first or field.name in hidden or not (field.name == spread or _differs(field, value)):
            continue
        if isinstance(value, dict):
            prefix = "" if field.name == spread else f"{field.name} "
            parts += [f"{prefix}{name}: {short(array)}" for name, array in value.items()]
        else:
            parts.append(f"{field.name}: {short(value)}" if hasattr(value, "dtype") else f"{field.name}={value!r}")
    return f"{type(instance).__name__}({', '.join(parts)})"


def _differs(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field has another value than its default; an array always does."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return default is dataclasses.MISSING or hasattr(value, "dtype") or value != default
