"""What a random program consists of, as data: its weights, steps, uses, wrappers, methods and placement."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

Array = jax.Array
Params = dict[str, Array]
Inputs = dict[str, Array]
Step = Callable[[Array, Params, Inputs], Array]  # (weight, parameters, inputs) -> weight or output
Weight = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Draw:
    """An entry of a catalogue, and the seed of what it draws: another entry may be left out without changing it."""

    name: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Branch:
    """One use of a weight, after some steps."""

    weight: str
    steps: tuple[Draw, ...]
    use: Draw


@dataclasses.dataclass(frozen=True)
class Plan:
    """A random program and its adapters.

    Arguments:
        shapes: the shapes of the weights.
        dtype: of the weights.
        branches: the uses, whose outputs the program returns.
        wrappers: kinds of program around them, the innermost first.
        methods: for each adapter of the list, the methods that it may use.
        placement: a seed for the shardings of parameters and inputs on eight devices; None for one device.
        explicit: whether the axes of that mesh are Explicit.
        quantized: whether the weights are held in 8 bits.
        seed: of all numbers.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: str
    branches: tuple[Branch, ...]
    wrappers: tuple[str, ...]
    methods: tuple[Draw, ...]
    placement: int | None
    explicit: bool
    quantized: bool
    seed: int

    def __str__(self) -> str:
        weights = ", ".join(f"{name} {self.dtype}{list(shape)}" for name, shape in self.shapes.items())
        lines = [f"weights {weights}{', in 8 bits' * self.quantized}"]
        for branch in self.branches:
            steps = " -> ".join(draw.name for draw in (*branch.steps, branch.use))
            lines.append(f"{branch.weight} -> {steps}")
        lines.append(f"inside {', '.join(self.wrappers) or 'nothing'}")
        lines.append(f"adapters: {', '.join(draw.name for draw in self.methods)}")
        return "\n".join([*lines, *self._place()])

    def _place(self) -> list[str]:
        if self.placement is None:
            return []
        return ["on eight devices, with Explicit axes" if self.explicit else "on eight devices"]

    def smaller(self) -> Iterator[Plan]:
        """Plans that lack one part of this one."""
        for k in range(len(self.branches) if len(self.branches) > 1 else 0):
            yield dataclasses.replace(self, branches=_without(self.branches, k))
        for k in range(len(self.wrappers)):
            yield dataclasses.replace(self, wrappers=_without(self.wrappers, k))
        for k in range(len(self.methods) if len(self.methods) > 1 else 0):
            yield dataclasses.replace(self, methods=_without(self.methods, k))
        for j, branch in enumerate(self.branches):
            for k in range(len(branch.steps)):
                shorter = dataclasses.replace(branch, steps=_without(branch.steps, k))
                yield dataclasses.replace(self, branches=(*self.branches[:j], shorter, *self.branches[j + 1 :]))
        plain = {"placement": None, "explicit": False, "quantized": False, "dtype": "float32"}
        for name, value in {**plain, "methods": tuple(Draw("lora", 0) for _ in self.methods)}.items():
            plan = dataclasses.replace(self, **{name: value})
            if plan != self:
                yield plan


def _without(items: tuple[Any, ...], k: int) -> tuple[Any, ...]:
    return (*items[:k], *items[k + 1 :])


class Unfit(Exception):  # noqa: N818, it is no error
    """A step that is not defined for the shape or dtype that it meets."""


def require(condition: bool) -> None:
    """Raises `Unfit` unless the condition holds."""
    if not condition:
        raise Unfit


class Scope:
    """The parameters and inputs that the steps of a program ask for, besides the weights."""

    def __init__(self, weights: dict[str, Weight], seed: int) -> None:
        self.params: dict[str, Weight] = dict(weights)
        self.inputs: dict[str, Weight | np.ndarray] = {}
        self._rng = np.random.default_rng(seed)

    def param(self, shape: tuple[int, ...], dtype: Any) -> str:
        """The name of a new parameter that the program uses beside the weights."""
        name = f"p{len(self.params)}"
        self.params[name] = Weight(shape, dtype)
        return name

    def input(self, shape: tuple[int, ...], dtype: Any) -> str:
        """The name of a new input of floating-point numbers."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = Weight(shape, dtype)
        return name

    def ids(self, shape: tuple[int, ...], low: int, high: int) -> str:
        """The name of a new input of integers from `low` to `high`, the latter not included."""
        name = f"i{len(self.inputs)}"
        self.inputs[name] = self._rng.integers(low, max(high, low + 1), shape).astype(np.int32)
        return name


Build = Callable[[random.Random, Weight, Scope], Step]


def after(step: Step, w: Weight, scope: Scope) -> Weight:
    """The shape and dtype of what a step returns."""
    inputs = {name: Weight(v.shape, v.dtype) for name, v in scope.inputs.items()}
    return jax.eval_shape(step, w, scope.params, inputs)
