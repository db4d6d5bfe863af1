"""That nothing of a weight's size is made of its update: read from the program that trains it, and from its FLOPs.

In the jaxpr of value and gradients, whatever depends on the adapter is an activation, a factor, or a product onto the
rank. None of it has the shape of a weight, or of what the base program makes of a weight before it uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora._compat import is_literal, open_jaxpr, scan_params
from tests.support import compiled as report
from tests.support.methods import shapes_of_adapter
from tests.support.programs import PROGRAMS, Program, floats, total
from tests.support.weight_uses import KINDS, Kind

Tree = Any
Dims = tuple[int, ...]

# Programs that differ in what they do to a weight; the law asserts of every pair that no weight is materialised.
DEFAULT, NIGHTLY = {"bare", "scan_layers", "grad"}, {"checkpoint", "cond", "vmap_outside", "shard_map"}

# One input channel a group: a kernel onto the rank is as large as the weight, which is small beside any activation.
SMALL = ("conv_depthwise", "conv_depthwise_wide")

# JAX can neither batch nor differentiate some programs twice, as `test_law.py` asserts.
PAIRS = [
    pytest.param(p, k, id=f"{p.name}-{k.name}", marks=[] if p.name in DEFAULT else [pytest.mark.nightly])
    for p in PROGRAMS
    for k in KINDS
    if p.name in DEFAULT | NIGHTLY and k.name not in SMALL and not (k.limited and p.demanding)
]


@pytest.mark.drawn(3)
@pytest.mark.parametrize(("program", "kind"), PAIRS)
def test_nothing_of_a_weights_shape_depends_on_the_adapter(program: Program, kind: Kind) -> None:
    fun = program.build(kind.use)
    params, x = jax.tree.map(jnp.asarray, kind.values(np.random.default_rng(0), program.copies))
    adapter = shapes_of_adapter(kind, fun, params, x, "lora_of_rank_1")
    frozen = {name: params[name] for name in kind.weights}
    views = made_of(lambda weights, x: fun({**params, **weights}, x), frozen, x) | {dims(a) for a in frozen.values()}

    def merged(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return fun(jlora.merge(params, adapter), x)

    adapter = program.stacked(adapter)
    assert views & made_of(step(program, merged, params, x), adapter), "merging is what this test is to notice"
    assert not views & made_of(step(program, jlora.adapt(fun, on_dense="error"), params, x), adapter)


def step(program: Program, side: Callable[..., Any], params: Tree, x: Tree) -> Callable[[Tree], Tree]:
    """Value and gradients, as a function of the adapter."""
    some, back = floats(x)
    side = program.around(side)
    return lambda adapter: jax.value_and_grad(lambda a, s: total(side(params, a, back(s))), (0, 1))(adapter, some)


def made_of(fun: Callable[..., Any], arg: Tree, *others: Tree) -> set[Dims]:
    """The shapes, in any order and without ones, of all that a program makes of its first argument alone."""
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(fun)(arg, *others))
    count = len(jax.tree.leaves(arg))
    first = [k < count for k in range(len(jaxpr.invars))]
    dependent, _ = depending(jaxpr, first)
    return {dims(var.aval) for var in dependent - depending(jaxpr, [not mark for mark in first])[0]}


def dims(a: Any) -> Dims:
    return tuple(sorted(n for n in a.shape if n > 1))


def depending(jaxpr: Any, inputs: Sequence[bool]) -> tuple[set[Any], list[bool]]:
    """Every variable of a jaxpr, and of those inside it, that depends on marked inputs, and marks for its outputs."""
    dependent = {var for var, marked in zip(jaxpr.invars, inputs, strict=True) if marked}
    for eqn in jaxpr.eqns:
        marks = [marked(atom, dependent) for atom in eqn.invars]
        if any(marks):
            inside = [depending(body, inputs) for body, inputs in bodies(eqn, marks)]
            outputs = [any(outs) for outs in zip(*(outs for _, outs in inside), strict=True)]
            if eqn.primitive.name == "optimization_barrier":
                outputs = marks
            if len(outputs) != len(eqn.outvars):
                outputs = [True] * len(eqn.outvars)
            dependent |= {var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark}
            dependent = dependent.union(*(inner for inner, _ in inside))
    return dependent, [marked(atom, dependent) for atom in jaxpr.outvars]


def marked(atom: Any, dependent: set[Any]) -> bool:
    return not is_literal(atom) and atom in dependent


def bodies(eqn: Any, marks: list[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """The jaxprs inside an equation, with marks for their inputs."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    for body in (open_jaxpr(v)[0] for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")):
        if eqn.primitive.name == "scan":
            p = scan_params(eqn)
            yield body, steady(body, marks, p.num_consts, p.num_carry)
        elif eqn.primitive.name == "cond":
            yield body, marks[1:]
        else:
            yield body, marks if len(marks) == len(body.invars) else [True] * len(body.invars)


def steady(body: Any, marks: list[bool], consts: int, carry: int) -> list[bool]:
    """Marks of a loop's inputs after as many steps as change any."""
    while True:
        after = depending(body, marks)[1][:carry]
        new = [*marks[:consts], *map(max, marks[consts : consts + carry], after), *marks[consts + carry :]]
        if new == marks:
            return marks
        marks = new


TOKENS, IN, OUT, HEADS = 512, 384, 320, 8


def kernel(p: Tree, x: Any) -> Any:
    return x @ p["w"]


def kernel_out_in(p: Tree, x: Any) -> Any:
    return x @ p["w"].T


def heads(p: Tree, x: Any) -> Any:
    return jnp.einsum("td,dhk->thk", x, p["w"])


def conv(p: Tree, x: Any) -> Any:
    return jax.lax.conv_general_dilated(
        x.reshape(8, 8, 8, IN), p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("fun", "shape"),
    [(kernel, (IN, OUT)), (kernel_out_in, (OUT, IN)), (heads, (IN, HEADS, OUT // HEADS)), (conv, (3, 3, IN, OUT))],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_step_costs_two_forward_passes(fun: Callable[..., Any], shape: Dims) -> None:
    """Forward, and backward to the input; the third, to the weight, is what low rank saves. By XLA's own count."""
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    x = jax.ShapeDtypeStruct((TOKENS, IN), jnp.float32)
    sites = jlora.trace(fun, params, x)
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, jlora.LoRA(rank=4)))

    def merged(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return fun(jlora.merge(params, adapter), x)

    def cost(side: Callable[..., Any], *args: Tree) -> float:
        return report.flops(jax.jit(side).lower(*args).compile())

    def trained(side: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, adapter, x: jax.value_and_grad(lambda a, x: total(side(params, a, x)), (0, 1))(adapter, x)

    forward = cost(fun, params, x)
    assert cost(trained(jlora.adapt(fun, on_dense="error")), params, adapter, x) <= 2.15 * forward
    assert cost(trained(merged), params, adapter, x) >= 2.9 * forward, "merging is what this test is to notice"
