"""Draws a random plan from a seed, and builds the program that it stands for."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from tests.support.campaign import nested_uses, nesting  # noqa: F401
from tests.support.campaign.plan import Array, Branch, Draw, Inputs, Params, Plan, Scope, Step, Unfit, Weight, after
from tests.support.campaign.steps import LARGEST, STEPS
from tests.support.campaign.uses import USES, output
from tests.support.methods import METHODS
from tests.support.programs import PROGRAMS, Program

DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "float8_e4m3fn")
SIZES = (1, 2, 3, 4, 4, 5, 6, 8)
WRAPPERS = {program.name: program for program in PROGRAMS if program.name not in ("bare", "named_and_printed")}


def draw_plan(seed: str) -> Plan:
    """The plan of a seed, any text."""
    r = random.Random(seed)

    def some(catalogue: Any, count: int) -> tuple[Draw, ...]:
        names = sorted(catalogue)
        return tuple(Draw(r.choice(names), r.randrange(2**32)) for _ in range(count))

    shapes = {name: tuple(r.choice(SIZES) for _ in range(r.choice([2, 2, 2, 3, 3, 4]))) for name in "wv"}
    if r.random() < 0.4:
        shapes["w"] = (*shapes["w"][:-1], shapes["w"][-2])  # square
    if r.random() < 0.5:
        shapes["v"] = shapes["w"]
    branches = []
    for _ in range(r.choice([1, 1, 2, 3])):
        steps = some(STEPS, r.choice([0, 1, 1, 2, 2, 3, 4, 6]))
        branches.append(Branch(r.choice("wwv"), steps, some(USES, 1)[0]))
    if r.random() < 0.4:  # a plain product states the roles of a weight whose other uses materialise it
        branches.append(Branch(branches[0].weight, (), Draw("product", r.randrange(2**32))))
    placed, quantized = r.random() < 0.2, r.random() < 0.07
    wrappers = r.choices(sorted(WRAPPERS), k=r.choice([0, 0, 1, 1, 1, 2, 3]))
    dtype = r.choice(DTYPES)
    return Plan(
        {name: shape for name, shape in shapes.items() if any(branch.weight == name for branch in branches)},
        r.choice(["float32", "bfloat16"]) if quantized else dtype,
        tuple(branches),
        tuple(name for name in wrappers if not (placed and name == "pmap_outside")),
        some(METHODS, r.choice([1, 1, 1, 2])),
        r.randrange(2**32) if placed else None,
        placed and not quantized and r.random() < 0.4,
        quantized,
        r.randrange(2**32),
    )


@dataclasses.dataclass(frozen=True)
class Built:
    """A plan as a program.

    Arguments:
        fun: `fun(params, x) -> outputs`.
        scope: the shapes of all parameters and inputs, before any program stacks copies of parameters.
        wrappers: the programs around the uses, the innermost first.
        kinds: the names of what the plan kept, for a count.
    """

    fun: Callable[[Params, Inputs], Any]
    scope: Scope
    wrappers: list[Program]
    kinds: list[str]

    @property
    def copies(self) -> tuple[int, ...]:
        """The leading axes of stacked parameters."""
        return tuple(program.copies for program in reversed(self.wrappers) if program.copies)

    @property
    def forward(self) -> bool:
        return any(program.forward for program in self.wrappers)

    def around(self, side: Any) -> Any:
        """What the programs put around one side of the law."""
        return functools.reduce(lambda side, program: program.around(side), self.wrappers, side)


def build(plan: Plan) -> Built:
    """The program of a plan. Steps that do not fit what they meet are left out, and uses are replaced by others."""
    scope = Scope({name: Weight(shape, jnp.dtype(plan.dtype)) for name, shape in plan.shapes.items()}, plan.seed)
    scope.input((1,), jnp.float32)  # programs ask for the sign of an input
    branches, kinds = [], []
    for branch in plan.branches:
        w, steps = scope.params[branch.weight], []
        narrow = [Draw("cast", branch.use.seed)] * (w.dtype.itemsize == 1)  # JAX computes little in 8 bits
        for draw in (*narrow, *branch.steps):
            try:
                step, new = _fitting(STEPS[draw.name], draw, w, scope)
            except Unfit:
                continue
            if _is_useful(new):
                w, steps, kinds = new, [*steps, step], [*kinds, draw.name]
        branches.append((branch.weight, steps, _use(branch.use, w, scope, kinds)))

    def use(p: Params, x: Inputs) -> list[Array]:
        outputs = []
        for name, steps, last in branches:
            a = functools.reduce(lambda a, step: step(a, p, x), steps, p[name])
            outputs.append(last(a, p, x))
        return outputs

    wrappers = [WRAPPERS[name] for name in plan.wrappers]
    fun = functools.reduce(lambda fun, program: program.build(fun), wrappers, use)
    return Built(fun, scope, wrappers, [*kinds, *plan.wrappers])


def _is_useful(w: Weight) -> bool:
    return jnp.issubdtype(w.dtype, jnp.floating) and 0 < math.prod(w.shape) <= LARGEST and 0 < len(w.shape) < 6


def _fitting(make: Any, draw: Draw, w: Weight, scope: Scope) -> tuple[Step, Weight]:
    """A step and what it returns. Errors of JAX about shapes and dtypes mean that the step does not fit."""
    names = set(scope.params), set(scope.inputs)
    try:
        step = make(random.Random(draw.seed), w, scope)
        return step, after(step, w, scope)
    except (Unfit, TypeError, ValueError, NotImplementedError, IndexError) as error:
        for store, old in zip((scope.params, scope.inputs), names, strict=True):
            for name in set(store) - old:
                del store[name]  # type: ignore[attr-defined]
        raise Unfit from error


def _use(draw: Draw, w: Weight, scope: Scope, kinds: list[str]) -> Step:
    others = random.Random(draw.seed).sample(sorted(USES), 4)
    for name in (draw.name, *others, "matmul", "product"):
        try:
            step, _ = _fitting(USES[name], draw, w, scope)
            output(step, w, scope)
        except Unfit:
            continue
        kinds.append(f"{name}()")
        return step
    kinds.append("entries()")
    return lambda a, p, x: a
