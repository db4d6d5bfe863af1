"""Repeated layers as one row: paths that differ in the numbers of their layers alone."""

import re
from collections.abc import Hashable, Sequence
from typing import Any


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
