"""Hyper-parameters: a field of a method declares which values it accepts.

    rank: int = positive_integer(8)
    alpha: float | None = nonzero(None)

The values are checked when the method is constructed. The check does not depend on the field's name or annotation.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Check:
    """Which values a field accepts.

    Arguments:
        text: the accepted values in words, for errors: "rank must be `text`".
        type: the Python type that NumPy's and JAX's numbers are converted to; None does not convert.
        accepts: whether a value is accepted.
        optional: whether None is accepted too.
    """

    text: str
    type: type | None
    accepts: Callable[[Any], bool]
    optional: bool = False


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)) and math.isfinite(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


_POSITIVE_INTEGER = Check("a positive integer", int, lambda value: _is_integer(value) and value >= 1)
_INTEGER = Check("an integer", int, _is_integer)
_NONZERO = Check("a finite non-zero number", float, lambda value: _is_finite(value) and value != 0)
_NUMBER = Check("a finite number", float, _is_finite)
_FRACTION = Check("a fraction in [0, 1)", float, lambda value: _is_finite(value) and 0 <= value < 1)
_SWITCH = Check("True or False", bool, _is_switch)

# Fields with these names and without a declaration are checked too, if they are annotated as numbers.
_DEFAULTS = {"rank": _POSITIVE_INTEGER, "alpha": _NONZERO, "dropout": _FRACTION}


def positive_integer(default: int | None) -> Any:
    """A field that holds 1, 2, ...; None too if it is the default.

    Arguments:
        default: the value that the field has if none is given.

    Raises:
        ValueError: when the method is constructed, if the value is not accepted.
    """
    return _field(_POSITIVE_INTEGER, default)


def integer(default: int | None) -> Any:
    """A field that holds any integer; None too if it is the default.

    Arguments:
        default: as for `positive_integer`.
    """
    return _field(_INTEGER, default)


def nonzero(default: float | None) -> Any:
    """A field that holds a finite number other than zero, such as alpha; None too if it is the default.

    Arguments:
        default: as for `positive_integer`.
    """
    return _field(_NONZERO, default)


def number(default: float) -> Any:
    """A field that holds a finite number.

    Arguments:
        default: as for `positive_integer`.
    """
    return _field(_NUMBER, default)


def fraction(default: float) -> Any:
    """A field that holds a number in [0, 1), such as a dropout rate.

    Arguments:
        default: as for `positive_integer`.
    """
    return _field(_FRACTION, default)


def switch(default: bool) -> Any:
    """A field that holds True or False.

    Arguments:
        default: as for `positive_integer`.
    """
    return _field(_SWITCH, default)


def choice(default: str, *others: str) -> Any:
    """A field that holds one of some strings.

    Arguments:
        default: as for `positive_integer`.
        others: the other strings.
    """
    options = (default, *others)
    text = f"one of {', '.join(map(repr, options))}"
    return _field(Check(text, None, lambda value: isinstance(value, str) and value in options), default)


def text(default: str) -> Any:
    """A field that holds a string.

    Arguments:
        default: as for `positive_integer`.
    """
    return _field(Check("a string", None, lambda value: isinstance(value, str)), default)


def optional(check: Any) -> Any:
    """The same field, which takes None as well.

    Arguments:
        check: a field, such as `positive_integer(8)`.
    """
    declared = dataclasses.replace(check.metadata["check"], optional=True)
    return dataclasses.field(default=check.default, metadata={"check": declared})


def _field(check: Check, default: Any) -> Any:
    check = dataclasses.replace(check, optional=default is None)
    return dataclasses.field(default=default, metadata={"check": check})


def check_fields(method: Any) -> None:
    """Checks the fields of a dataclass, and converts NumPy's and JAX's numbers to Python's.

    Raises:
        ValueError: if a value is not accepted; with the field, the accepted values, and the value.
    """
    for field in dataclasses.fields(method):
        check = field.metadata.get("check") or _default_check(field)
        value = getattr(method, field.name)
        if check is None or (value is None and check.optional):
            continue
        if not check.accepts(value):
            raise ValueError(f"{type(method).__name__}'s {field.name} is {check.text}, not {value!r}.")
        if check.type is not None and type(value) not in (bool, int, float):
            object.__setattr__(method, field.name, check.type(value))


def check_hash(method: Any) -> None:
    """Checks that a method can be a part of what JAX compiles a program for.

    Raises:
        TypeError: if a field has a value without a hash; with the field.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        try:
            hash(None if field.hash is False else value)
        except TypeError:
            raise TypeError(
                f"{type(method).__name__}'s {field.name} is of type {type(value).__name__}, which has no hash. "
                "Hyper-parameters are numbers, strings, booleans, None, or tuples of them; arrays belong to `factors`."
            ) from None


def _default_check(field: "dataclasses.Field[Any]") -> Check | None:
    """The check of a field without a declaration, by its name and its annotation, which may be a string."""
    check = _DEFAULTS.get(field.name)
    annotation = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    words = annotation.replace("|", " ").split()
    if check is None or not {"int", "float"} & set(words):
        return None
    return dataclasses.replace(check, optional="None" in words)


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of a step next to a value that is not one, for errors: "6, 9"."""
    low = value // step * step
    return ", ".join(str(n) for n in (low, low + step) if n)


def scale_of(alpha: float | None, rank: int, rank_stabilized: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) if stabilised; 1 without alpha."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)
