"""Judges a random program: the law, the report of dense weights, and errors of jlora's own."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import traceback
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from tests.support.campaign.compare import Results, compare
from tests.support.campaign.draw import Built, build
from tests.support.campaign.numbers import adapters, mesh_of, noisy, values
from tests.support.campaign.plan import Plan

Tree = Any


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a plan.

    Arguments:
        outcome: "agrees"; "coarse" if the two sides agree within roundings that are as large as what the adapter
            changes; "nothing" if no weight can be adapted; "refused" if JAX refuses the base program too;
            "miscompiled" if XLA gives the merged program other values on eight devices than on one, or cannot compile
            for eight what it compiles for one; "fault".
        text: of a fault.
        kinds: the names of all that the program consists of.
    """

    outcome: str
    text: str = ""
    kinds: tuple[str, ...] = ()


class Refused(Exception):  # noqa: N818, it is no error of jlora's
    """JAX refuses the base program."""


def judge(plan: Plan) -> Verdict:
    """Runs a plan. Whatever jlora raises on a program that JAX runs is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("always", category=jlora.DenseWarning)
        try:
            built = build(plan)
        except Exception:
            return Verdict("fault", f"the campaign cannot build this\n{traceback.format_exc()}")
        try:
            plan = _placeable(plan, built)
            with jax.set_mesh(mesh_of(plan)) if plan.explicit and plan.placement else contextlib.nullcontext():
                outcome, text = _judge(plan, built)
            if outcome == "fault" and plan.placement is not None and _is_miscompiled(plan, built):
                outcome = "miscompiled"
        except jax.errors.JaxRuntimeError:
            on_one = dataclasses.replace(plan, placement=None)
            if plan.placement is None or _judge(on_one, built)[0] == "fault":
                outcome, text = "fault", traceback.format_exc(limit=-12)
            else:
                outcome, text = "miscompiled", ""
        except Refused:
            outcome, text = "refused", ""
        except Exception:
            outcome, text = "fault", traceback.format_exc(limit=-12)
    return Verdict(outcome, text, (*built.kinds, *(draw.name for draw in plan.methods)))


def _placeable(plan: Plan, built: Built) -> Plan:
    """The plan, on one device if it has lookups or convolutions, of which XLA's partitioner crashes on some."""
    if plan.placement is None:
        return plan
    params, x = values(dataclasses.replace(plan, placement=None), built)
    try:
        text = str(jax.make_jaxpr(built.fun)(jlora.dequantize(params), x))
    except Exception as error:
        raise Refused from error
    return (
        dataclasses.replace(plan, placement=None)
        if re.search(r"\b(gather|dynamic_slice|conv_general_dilated)\[", text)
        else plan
    )


def _judge(plan: Plan, built: Built) -> tuple[str, str]:
    params, x = values(plan, built)
    lead = tuple(program.adapters for program in reversed(built.wrappers) if program.adapters)
    plain = jlora.dequantize(params)
    _check_base(built, jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, *a.shape)), plain) if lead else plain, x)
    sites = jlora.trace(built.fun, params, x)
    str(sites)
    adapter = adapters(plan, sites, params, lead)
    if not adapter:
        return "nothing", ""
    one = jax.tree.map(lambda a: a[(0,) * len(lead)], adapter) if lead else adapter
    jlora.merge(params, one)
    caught, results = _run(built, params, adapter, x)
    reported = _check_report(plan, built, params, one, x, warned=bool(caught))
    return ("fault", reported) if reported else compare(results)


def _is_miscompiled(plan: Plan, built: Built) -> bool:
    """Whether the merged program gives other values on eight devices than on one: then XLA is at fault."""
    results = []
    for placed in (plan, dataclasses.replace(plan, placement=None)):
        params, x = values(placed, built)
        adapter = adapters(plan, jlora.trace(built.fun, params, x), params, ())
        results.append(_run(built, params, adapter, x)[1])
    return compare(dataclasses.replace(results[1], adapted=results[0].merged))[0] == "fault"


def _check_base(built: Built, params: Tree, x: Tree) -> None:
    """Raises `Refused` if JAX refuses the base program, or its derivatives."""
    try:
        side = built.around(lambda _, params, x: built.fun(params, x))
        jax.eval_shape(_derivatives(built, side), params, params, x)
    except Exception as error:
        raise Refused from error


def _run(built: Built, params: Tree, adapter: Tree, x: Tree) -> tuple[list[Any], Results]:
    """DenseWarnings, and the results."""
    adapted = built.around(jlora.adapt(built.fun))
    merged = built.around(lambda params, adapter, x: built.fun(jlora.merge(params, adapter), x))
    base = built.around(lambda params, adapter, x: built.fun(jlora.dequantize(params), x))

    def both(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return _derivatives(built, adapted)(params, adapter, x), *reference(params, adapter, x)

    def reference(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return _derivatives(built, merged)(params, adapter, x), base(params, adapter, x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.filterwarnings("always", category=jlora.DenseWarning)
        try:
            lowered, run, (got, want, unadapted) = _compile(both, params, adapter, x)
        except Exception:
            try:
                _compile(reference, params, adapter, x)
            except Exception as error:
                raise Refused from error
            raise
    eps = _coarsest(str(lowered.as_text()))
    others = [run(*(noisy(tree, seed, eps) for tree in (params, adapter, x)))[1] for seed in (1, 2)]
    narrow = [a.dtype for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.floating)]
    storage = max(float(jnp.finfo(dtype).eps) for dtype in narrow)
    return caught, Results(eps, storage, got, want, unadapted, others)


def _compile(fun: Any, *args: Tree) -> tuple[Any, Any, Any]:
    """The lowered function, the compiled one, and its results; some backends refuse a product only as it runs."""
    lowered = jax.jit(fun).lower(*args)
    run = lowered.compile()
    return lowered, run, jax.block_until_ready(run(*args))


def _coarsest(text: str) -> float:
    """The coarsest rounding of an activation: of float32, float16 or bfloat16, whichever the program has."""
    mantissas = {int(m) for m in re.findall(r"reduce_precision.*?e\d+m(\d+)", text)}
    narrow = [7] * ("xbf16>" in text) + [10] * ("xf16>" in text) + [m for m in mantissas if m >= 7]
    return 2.0 ** -min([22, *narrow])


def _derivatives(built: Built, side: Any) -> Any:
    """Values, and derivatives by the adapter and the inputs, in one direction."""

    def run(params: Tree, adapter: Tree, x: Tree) -> Tree:
        leaves, treedef = jax.tree.flatten((adapter, x))
        chosen = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def f(some: list[Any]) -> Tree:
            filled = dict(enumerate(leaves)) | dict(zip(chosen, some, strict=True))
            return side(params, *jax.tree.unflatten(treedef, [filled[k] for k in range(len(leaves))]))

        some = [leaves[k] for k in chosen]
        if built.forward:
            value, tangent = jax.jvp(f, (some,), (_direction(some),))
            return {"value": value, "derivative": tangent}
        value, pull = jax.vjp(f, some)
        return {"value": value, "derivative": pull(_direction(value))[0]}

    return run


def _direction(tree: Tree) -> Tree:
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree)


def _check_report(plan: Plan, built: Built, params: Tree, adapter: Tree, x: Tree, *, warned: bool) -> str:
    """`explain` must list what `adapt` warns of, and nothing else if all updates have low rank."""
    explained = jlora.explain(built.fun, params, adapter, x)
    str(explained)
    if warned and not explained.dense:
        return "adapt warned of dense weights, and explain lists none"
    updates = [update for each in adapter for update in each.values()]
    thin = all(isinstance(u.method, jlora.LoRA) and min(_sides(u)) > 2 * u.method.rank for u in updates)
    if thin and explained.dense and not warned and not plan.quantized:
        return f"explain lists dense weights, and adapt did not warn:\n{explained}"
    return ""


def _sides(update: jlora.Update) -> list[int]:
    """The sizes of the two sides of an update as a matrix."""
    sides = [1, 1]
    for n, role in zip(update.shape, update.roles, strict=True):
        if role != "stack":
            sides[role == "out"] *= n
    return sides
