"""Hyper-parameters: what numbers and switches have to be, by their names."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, get_args

import numpy as np


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral)


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


_COUNT = "a whole number from 1 on", int, lambda value: _whole(value) and value >= 1
_WHOLE = "a whole number", int, _whole
_SCALE = "a number other than zero", float, lambda value: _finite(value) and value != 0
_NUMBER = "a number", float, _finite
_SHARE = "a share in [0, 1)", float, lambda value: _finite(value) and 0 <= value < 1
_SWITCH = "True or False", bool, lambda _: True

_KINDS: dict[str, tuple[str, type, Callable[[Any], bool]]] = {
    **dict.fromkeys(("rank", "k", "n", "groups", "block", "levels"), _COUNT),
    **dict.fromkeys(("factor", "group_axis", "seed"), _WHOLE),
    **dict.fromkeys(("alpha", "reach", "scaling"), _SCALE),
    "d_initial": _NUMBER,
    "dropout": _SHARE,
    **dict.fromkeys(("offset", "rank_stabilized", "freeze_a", "decompose_both"), _SWITCH),
}


def check(method: Any) -> None:
    """Raises unless every number and switch makes sense; NumPy's become Python's.

    A field is one of these by its name and its type: another method may use the name for something else.

    Raises:
        ValueError: with the field, what it has to be and what it is.
    """
    for field in dataclasses.fields(method):
        if field.name not in _KINDS:
            continue
        said, make, fits = _KINDS[field.name]
        value, types = getattr(method, field.name), get_args(field.type) or (field.type,)
        if make not in types or (value is None and type(None) in types):
            continue
        if isinstance(value, (bool, np.bool_)) != (make is bool) or not fits(value):
            raise ValueError(f"{type(method).__name__}'s {field.name} is {said}, not {value!r}.")
        if type(value) not in (bool, int, float):
            object.__setattr__(method, field.name, make(value))
