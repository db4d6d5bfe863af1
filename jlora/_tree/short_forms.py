"""Short forms of counts, dtypes, arrays and dataclasses."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any


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
