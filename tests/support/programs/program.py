"""A kind of program, and the catalogue that holds all kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Tree = Any
Use = Callable[[Any, Any], Any]
Side = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """One way to run what uses a weight.

    Arguments:
        name: the function's name.
        build: `build(use) -> fun`, with `fun(params, inputs) -> y`.
        around: `around(side) -> side`, applied to both sides of the law.
        copies: how many stacked copies of every parameter `fun` takes; zero for the parameters themselves.
        adapters: how many stacked adapters `around` takes; zero for one adapter.
        forward: whether JAX differentiates it in forward mode only.
        materialised: whether it uses the weight itself, so that the merged weight must be materialised.
        demanding: whether it needs batching rules or second derivatives, which JAX may lack.
    """

    name: str
    build: Callable[[Use], Use]
    around: Callable[[Side], Side]
    copies: int = 0
    adapters: int = 0
    forward: bool = False
    materialised: bool = False
    demanding: bool = False

    def stacked(self, adapter: Any) -> Any:
        """The shapes of as many adapters as the program takes."""
        lead = (self.adapters,) if self.adapters else ()
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype), adapter)


PROGRAMS: list[Program] = []


def same(fun: Any) -> Any:
    """The function unchanged."""
    return fun


def program(**options: Any) -> Callable[[Callable[[Use], Use]], Callable[[Use], Use]]:
    """Adds `build` to the catalogue, with these fields of `Program`."""

    def register(build: Callable[[Use], Use]) -> Callable[[Use], Use]:
        PROGRAMS.append(Program(build.__name__, build, same, **options))
        return build

    return register


def outside(**options: Any) -> Callable[[Callable[[Side], Side]], Callable[[Side], Side]]:
    """Adds `around` to the catalogue, with these fields of `Program`."""

    def register(around: Callable[[Side], Side]) -> Callable[[Side], Side]:
        PROGRAMS.append(Program(around.__name__, same, around, **options))
        return around

    return register
