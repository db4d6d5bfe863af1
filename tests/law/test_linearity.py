"""Every primitive that a rule passes an update through is linear in the weight, or is treated as the law demands."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora._interpreter.rules import RULES
from tests.support.agreement import adapter_for, check_law, difference
from tests.support.linearity import ABSENT, ALIASES, CLASSES, NOT_LINEAR, ROUNDING, Op, surroundings
from tests.support.pages import ROOT

SHAPES = {"wide": (4, 6), "square": (6, 6)}
ENTRIES = {name: (kind, op) for kind, ops in CLASSES.items() for name, op in ops.items()}
LINEAR = [name for name, (kind, _) in ENTRIES.items() if kind not in ("rounding", "dense")]
FORWARD = {"while", "custom_vmap_call"}  # JAX differentiates these in forward mode only

of_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def test_every_rule_has_an_entry() -> None:
    """A rule that is added needs one: that the primitive is linear, or what the rule does instead."""
    extensions = {name for name, rule in RULES.items() if not rule.__module__.startswith("jlora.")}
    assert {*ENTRIES, *ALIASES, *ABSENT} == set(RULES) - extensions
    assert not ALIASES.keys() & ENTRIES.keys()
    for other, name in ALIASES.items():
        assert RULES[other] is RULES[name]


def test_the_page_lists_the_entries() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    table = page.split("\n## What an update passes through\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \|.*\|(.*)\|$", table, re.MULTILINE)[1:]
    listed = {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows}
    assert listed == {kind: set(ops) for kind, ops in CLASSES.items()}


def primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives of a program, with those of the programs inside."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    parts = [part for eqn in jaxpr.eqns for value in eqn.params.values() for part in programs_in(value)]
    return names.union(*(primitives(getattr(part, "jaxpr", part)) for part in parts))


def programs_in(value: Any) -> list[Any]:
    """The programs that a parameter of an equation holds."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [part for part in values if hasattr(part, "eqns") or hasattr(part, "jaxpr")]


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_uses_its_primitive(name: str) -> None:
    with surroundings(name):
        used = primitives(jax.make_jaxpr(ENTRIES[name][1])(jnp.ones((4, 6))).jaxpr)
    assert {name, *(other for other, main in ALIASES.items() if main == name)} & used, used


@of_shapes
@pytest.mark.parametrize("name", LINEAR)
def test_a_primitive_is_linear(name: str, shape: tuple[int, int]) -> None:
    """`op(a x + b y) = a op(x) + b op(y)`, without the constant of an affine one."""
    kind, op = ENTRIES[name]
    x, y = (jnp.asarray(np.random.default_rng(k).normal(size=shape), jnp.float32) for k in (1, 2))
    weights = jnp.zeros(shape), x, y, 1.5 * x - 0.5 * y
    with surroundings(name):
        run = jax.jit(op)
        constant, first, second, mixed = (np.asarray(run(w)) for w in weights)
    assert bool(constant.any()) == (kind == "affine")
    expected = 1.5 * (first - constant) - 0.5 * (second - constant)
    np.testing.assert_allclose(mixed - constant, expected, rtol=1e-5, atol=1e-4)
    assert expected.any()


def adapted(op: Op, shape: tuple[int, int]) -> tuple[Any, Any, Any, jax.Array]:
    """A product with what the operation makes of a weight, its parameters, an adapter of rank 1 and an input."""

    def fun(params: Any, x: jax.Array) -> jax.Array:
        w = op(params["w"])
        inner = w.shape[:-1]
        weights = (1.5 + jnp.sin(jnp.arange(2.0 * math.prod(inner)))).reshape(2, *inner)
        return jnp.tensordot(weights * x, w, w.ndim - 1)

    def plain(params: Any, x: jax.Array) -> jax.Array:
        return (x * jnp.ones((2, shape[0]))) @ params["w"]

    rng, x = np.random.default_rng(3), jnp.float32(1.5)
    params = {"w": jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)}
    adapter = adapter_for(jlora.trace(plain, params, x), {"w": jlora.LoRA(rank=1)}, rng, positive=True)
    return fun, params, adapter, x


@of_shapes
@pytest.mark.parametrize("name", ENTRIES)
def test_the_law_holds_and_linear_primitives_keep_the_weight_factored(name: str, shape: tuple[int, int]) -> None:
    kind, op = ENTRIES[name]
    bound = 2**-7 if name in ROUNDING else 2e-5
    with surroundings(name):
        fun, params, adapter, x = adapted(op, shape)
        assert bool(jlora.explain(fun, params, adapter, x).dense) == (kind == "dense")
        if name not in FORWARD:
            check_law(fun, params, adapter, x, bound=bound)
        else:
            ours = jax.jvp(lambda a: jlora.adapt(fun, on_dense="allow")(params, a, x), (adapter,), (adapter,))
            merged = jax.jvp(lambda a: fun(jlora.merge(params, a), x), (adapter,), (adapter,))
            assert difference(ours, merged) <= bound


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_is_materialised(name: str) -> None:
    fun, params, adapter, x = adapted(NOT_LINEAR[name], (4, 6))
    assert jlora.explain(fun, params, adapter, x).dense
    with pytest.warns(jlora.DenseWarning, match=r"w: "):
        value = jlora.adapt(fun)(params, adapter, x)
    np.testing.assert_allclose(value, fun(jlora.merge(params, adapter), x), rtol=2e-5, atol=1e-5)
