"""Sizes of axes. In a program that is exported with `jax.export.symbolic_shape` a size may be a symbolic expression.

JAX compares symbolic sizes by `==` and `!=`, where sizes that are not always equal count as different. It refuses `<`
and `>` unless the answer is the same for all values, and Python's `/` makes an array of them.
"""

from typing import Any


def is_wide(size: Any) -> bool:
    """Whether an axis has more than one entry; an axis of symbolic size counts as one that has."""
    return size not in (0, 1)


def is_static(size: Any) -> bool:
    """Whether a size is a number and not a symbolic expression."""
    return isinstance(size, int)
