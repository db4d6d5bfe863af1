"""Names with numbers as expressions of indices: one template for all layers of a stack, or for many paths."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_NUMBER = re.compile(r"(?<![^./_])(\d+)(?![^./_])")  # a number that is a component of a name
LETTERS = "ijklmnop"


class Expression(NamedTuple):
    """A number in a name: `constant + sum of coefficients[k] * index k`."""

    constant: int
    coefficients: tuple[int, ...]

    def at(self, index: Sequence[int]) -> int:
        """The number at an index."""
        return self.constant + sum(factor * i for factor, i in zip(self.coefficients, index, strict=False))

    def text(self, letters: Sequence[str]) -> str:
        """The expression in braces, `{i}` or `{2*i+1}`; plain digits if it depends on no index."""
        terms = [
            (str(factor) + "*" if factor != 1 else "") + letter
            for factor, letter in zip(self.coefficients, letters, strict=False)
            if factor
        ]
        if not terms:
            return str(self.constant)
        offset = f"{self.constant:+d}" if self.constant else ""
        return "{" + "+".join(terms) + offset + "}"


Template = tuple[str | Expression, ...]


def split_numbers(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A name without its numbers, in the pieces between them, and the numbers."""
    parts = _NUMBER.split(name)
    return tuple(parts[::2]), tuple(int(number) for number in parts[1::2])


def fit(names: Mapping[tuple[int, ...], str]) -> Template | None:
    """The template that gives every name from its indices; None if there is none.

    Arguments:
        names: by index; all indices have the same length.
    """
    texts, numbers = zip(*(split_numbers(name) for name in names.values()), strict=True)
    if len(set(texts)) > 1:
        return None
    expressions = [_fit_numbers(list(names), [row[slot] for row in numbers]) for slot in range(len(numbers[0]))]
    if any(expression is None for expression in expressions):
        return None
    return tuple(itertools.chain(*itertools.zip_longest(texts[0], expressions, fillvalue="")))  # pyright: ignore


def _fit_numbers(indices: Sequence[tuple[int, ...]], values: Sequence[int]) -> Expression | None:
    """Whole coefficients that give the values from the indices; those of an index that does not vary are zero."""
    matrix = np.array([[1, *index] for index in indices], float)
    varies = np.ptp(matrix, axis=0) > 0
    varies[0] = True
    solution = np.zeros(matrix.shape[1], int)
    solution[varies] = np.rint(np.linalg.lstsq(matrix[:, varies], np.array(values, float), rcond=None)[0])
    if not np.array_equal(matrix @ solution, values) or min(solution[1:], default=0) < 0:
        return None
    return Expression(int(solution[0]), tuple(int(factor) for factor in solution[1:]))


def render(template: Template, letters: Sequence[str]) -> str:
    """A template as text, with a letter for each index."""
    return "".join(part if isinstance(part, str) else part.text(letters) for part in template)


def used_indices(template: Template) -> list[int]:
    """The indices on which a template depends, in the order in which they appear, each once."""
    order = [
        number
        for part in template
        if isinstance(part, Expression)
        for number, factor in enumerate(part.coefficients)
        if factor
    ]
    return list(dict.fromkeys(order))


def varying(numbers: Iterable[tuple[int, ...]]) -> list[int]:
    """The positions at which some rows of numbers differ."""
    rows = list(numbers)
    return [slot for slot in range(len(rows[0])) if len({row[slot] for row in rows}) > 1]
