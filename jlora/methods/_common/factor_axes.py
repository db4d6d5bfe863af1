"""The declared axes of factors: a string such as "*stack *in rank" for every factor of a method.

A token with a star is a group of axes of the weight, any other token an axis of the method:

    *stack      layers of a scan, experts, batch axes
    *layers     the stack axes but the last: the layers of a scan, if the last axis is that of experts
    *in         all contracted axes; of a convolution its channels and its window
    *channels   contracted axes without a window
    *window     the spatial axes of a convolution
    *out        output axes
    *weight     all axes, in the weight's own order
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import jax

from jlora._interpreter.context import Role, matrix_side

STACKS = ("*stack", "*layers")
GROUPS = (*STACKS, "*in", "*channels", "*window", "*out", "*weight")


class HasAxes(Protocol):
    """A site or an update: an object with the shape of a weight and the roles of its axes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def roles(self) -> tuple[Role, ...]: ...


@dataclasses.dataclass(frozen=True)
class WeightAxes:
    """The axes of a weight by group.

    Arguments:
        shape: the shape of the weight.
        roles: the role of every axis; empty if no product uses the weight.
    """

    shape: tuple[int, ...]
    roles: tuple[Role, ...]

    @classmethod
    def of(cls, weight: HasAxes) -> "WeightAxes":
        return cls(tuple(weight.shape), tuple(weight.roles))

    def axes(self, group: str) -> tuple[int, ...]:
        """The numbers of the axes in a group, in the order of the weight."""
        if group == "*weight":
            return tuple(range(len(self.shape)))
        if group == "*layers":
            return self.axes("*stack")[:-1]
        if group in ("*channels", "*window"):
            role = {"*channels": "in", "*window": "window"}[group]
            return tuple(axis for axis, r in enumerate(self.roles) if r == role)
        return tuple(axis for axis, r in enumerate(self.roles) if matrix_side(r) == group.removeprefix("*"))

    def sizes(self, group: str) -> tuple[int, ...]:
        """The sizes of the axes in a group."""
        return tuple(self.shape[axis] for axis in self.axes(group))

    def count(self, group: str) -> int:
        """The product of the sizes in a group."""
        return math.prod(self.sizes(group))


def expand(declared: str, axes: WeightAxes) -> tuple[int | str, ...]:
    """One entry for every axis of a factor: the number of the same axis of the weight, or the name of a method's axis.

    Raises:
        ValueError: if a token with a star is not a group.
    """
    entries: list[int | str] = []
    for token in declared.split():
        if token.startswith("*") and token not in GROUPS:
            raise ValueError(f"{token!r} in {declared!r} is not a group of axes; the groups are {', '.join(GROUPS)}.")
        entries += axes.axes(token) if token in GROUPS else (token,)
    return tuple(entries)


def shape(declared: str, axes: WeightAxes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a factor; `sizes` has the sizes of the method's axes."""
    return tuple(axes.shape[entry] if isinstance(entry, int) else sizes[entry] for entry in expand(declared, axes))


def layer_shape(declared: str, axes: WeightAxes, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a factor for one layer of a stack, with one axis for each token: `(in, rank)`."""
    tokens = [token for token in declared.split() if token not in STACKS]
    return tuple(axes.count(token) if token in GROUPS else sizes[token] for token in tokens)


def join_groups(array: jax.Array, declared: str, axes: WeightAxes) -> jax.Array:
    """A factor with each group of axes joined, except for the stack: `(*stack, in, rank)`."""
    dims, position = [], 0
    for token in declared.split():
        width = len(axes.axes(token)) if token in GROUPS else 1
        part = array.shape[position : position + width]
        dims += part if token in STACKS else (math.prod(part),)
        position += width
    return array.reshape(dims)


def as_pair(a: jax.Array, b: jax.Array, declared: tuple[str, str], axes: WeightAxes) -> tuple[jax.Array, jax.Array]:
    """Two factors with an axis `rank` as `(*stack, in, rank)` and `(*stack, rank, out)`.

    Axes other than the rank that both have count as part of the stack.
    """
    entries = [expand(text, axes) for text in declared]
    shared = [entry for entry in entries[0] if entry in entries[1] and entry != "rank"]

    def arrange(array: jax.Array, labels: tuple[int | str, ...], rank_last: bool) -> jax.Array:
        free = [entry for entry in labels if entry not in (*shared, "rank")]
        order = [*shared, *free, "rank"] if rank_last else [*shared, "rank", *free]
        array = array.transpose([labels.index(entry) for entry in order])
        rank = array.shape[-1] if rank_last else array.shape[len(shared)]
        return array.reshape(*array.shape[: len(shared)], *((-1, rank) if rank_last else (rank, -1)))

    return arrange(a, entries[0], True), arrange(b, entries[1], False)


def from_pair(matrix: jax.Array, like: jax.Array, declared: tuple[str, str], axes: WeightAxes, which: int) -> jax.Array:
    """The inverse of `as_pair` for one of the two, with the shape of `like`."""
    entries = [expand(text, axes) for text in declared]
    shared = [entry for entry in entries[0] if entry in entries[1] and entry != "rank"]
    labels = entries[which]
    free = [entry for entry in labels if entry not in (*shared, "rank")]
    order = [*shared, *free, "rank"] if which == 0 else [*shared, "rank", *free]
    arranged = matrix.reshape([like.shape[labels.index(entry)] for entry in order])
    return arranged.transpose([order.index(entry) for entry in labels])
