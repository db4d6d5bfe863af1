"""What an adapted program keeps between its passes, and in which dtype: the activations between factors."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import jlora
from jlora._compat import open_jaxpr
from tests.support import toy_model

Tree = Any
RANK, BATCH, TIME = 2, 13, 7
ONLY_OURS = jax.checkpoint_policies.save_only_these_names("jlora")
NOTHING = jax.checkpoint_policies.nothing_saveable


def feed_forward(p: Tree, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["up"]) @ p["down"])


def lookup(p: Tree, x: jax.Array) -> jax.Array:
    ids = jnp.arange(BATCH * TIME).reshape(BATCH, TIME) % p["table"].shape[0]
    return jnp.tanh(jnp.tanh(p["table"][ids] + x) @ p["table"].T)


def conv(p: Tree, x: jax.Array) -> jax.Array:
    return jnp.tanh(jax.lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")))


def stacked(p: Tree, x: jax.Array) -> jax.Array:
    layer = jax.checkpoint(lambda x, w: (feed_forward(w, x), None), policy=ONLY_OURS)
    return jax.lax.scan(layer, x, p)[0]


PROGRAMS = {
    feed_forward: {"up": (8, 12), "down": (12, 8)},
    lookup: {"table": (11, 8)},
    conv: {"kernel": (3, 8, 12)},
}


def made(sizes: dict[str, tuple[int, ...]], fun: Callable[..., Any]) -> tuple[Tree, Tree, jax.Array]:
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=n), jnp.float32) for k, n in sizes.items()}
    x = jnp.asarray(rng.normal(size=(BATCH, TIME, 8)), jnp.float32)
    return params, toy_model.random_adapter(jlora.trace(fun, params, x), jlora.LoRA(RANK)), x


@pytest.mark.parametrize("fun", PROGRAMS, ids=lambda fun: fun.__name__)
def test_a_policy_keeps_what_lies_between_factors_and_nothing_else(fun: Any, capsys: Any) -> None:
    """By JAX's own account of what a rematerialised program saves."""
    params, adapter, x = made(PROGRAMS[fun], fun)

    def run(policy: Any) -> Callable[[Tree, jax.Array], jax.Array]:
        return lambda adapter, x: jlora.adapt(jax.checkpoint(fun, policy=policy))(params, adapter, x).sum()

    saved = {}
    for policy in (ONLY_OURS, NOTHING):
        print_saved_residuals(run(policy), adapter, x)
        lines = re.findall(r"f32\[([\d,]*)\] (named 'jlora')?", capsys.readouterr().out)
        saved[policy] = collections.Counter((tuple(map(int, dims.split(","))), bool(name)) for dims, name in lines)
    assert saved[ONLY_OURS] - saved[NOTHING] == {((BATCH, TIME, RANK), True): 1 if fun is conv else 2}
    assert not saved[NOTHING] - saved[ONLY_OURS]

    plain = jax.jit(jax.grad(lambda a, x: jlora.adapt(fun)(params, a, x).sum()))(adapter, x)
    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(run(ONLY_OURS)))(adapter, x)), jax.tree.leaves(plain), strict=True
    ):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_scan_keeps_them_for_every_layer() -> None:
    """Beside the carry, which every scan keeps, there are two numbers a row for each of two products."""
    params, adapter, x = made({"up": (3, 8, 12), "down": (3, 12, 8)}, stacked)
    step = jax.make_jaxpr(jax.grad(lambda a: jlora.adapt(stacked)(params, a, x).sum()))(adapter)
    forward = next(eqn for eqn in open_jaxpr(step)[0].eqns if eqn.primitive.name == "scan")
    shapes = [var.aval.shape for var in forward.outvars]  # pyright: ignore[reportAttributeAccessIssue]
    kept = collections.Counter(shape for shape in shapes if TIME in shape)
    assert kept == {(BATCH, TIME, 8): 1, (3, BATCH, TIME, 8): 1, (3, BATCH, TIME, RANK): 2}


METHODS = [jlora.LoRA(RANK), jlora.DoRA(RANK), jlora.LoHa(RANK), jlora.IA3()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_activations_stay_in_bfloat16_over_float32_factors(method: jlora.Method) -> None:
    """Forward and backward: what is as large as an activation is in the base's dtype; factors and gradients are not."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), toy_model.params())
    ids = jnp.arange(BATCH * TIME).reshape(BATCH, TIME) % toy_model.VOCABULARY
    adapter = toy_model.adapter(method)
    assert {a.dtype for a in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}

    def both(adapter: Tree, g: jax.Array) -> Any:
        def forward(adapter: Tree) -> jax.Array:
            return jlora.adapt(toy_model.model, on_dense="error")(params, adapter, ids)

        y, back = jax.vjp(forward, adapter)
        return y, back(g)

    g = jax.ShapeDtypeStruct((BATCH, TIME, toy_model.VOCABULARY), jnp.bfloat16)
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(both)(adapter, g))
    rows = [a for a in inside(jaxpr) if a.size % (BATCH * TIME) == 0 and a.size >= BATCH * TIME * toy_model.WIDTH]
    assert {a.dtype for a in rows if jnp.issubdtype(a.dtype, jnp.floating)} == {jnp.dtype(jnp.bfloat16)}
    y, (gradients,) = jax.eval_shape(both, adapter, g)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def inside(jaxpr: Any) -> Iterator[Any]:
    """The types of all that a jaxpr, and those inside it, compute."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
        for v in values:
            if hasattr(v, "eqns") or hasattr(v, "jaxpr"):
                yield from inside(open_jaxpr(v)[0])
