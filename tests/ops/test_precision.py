"""The precision of products: what the program asks for holds for all that an adapted program multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora._compat import bodies, open_jaxpr
from tests.support.methods import METHODS, fitting

FULL = lax.Precision.HIGHEST
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated", "jlora_product")
SHAPES = {"up": (8, 12), "experts": (2, 8, 6), "kernel": (3, 8, 4), "table": (6, 8)}
DEFAULT = ("fourierft", "tinylora")
# FRoD computes its matrix from three as large as the weight, at JAX's default precision.
CASES = [
    pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.nightly]) for name in METHODS if "frod" not in name
]


def program(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Every kind of product at full precision, and a lookup, which is exact whatever the precision is."""
    image = {"dimension_numbers": ("NWC", "WIO", "NWC"), "precision": FULL}
    return (
        jnp.matmul(x, params["up"], precision=FULL),
        lax.ragged_dot(x, params["experts"], jnp.asarray([1, 4]), precision=FULL),
        lax.conv_general_dilated(x[None], params["kernel"], (1,), "SAME", **image),
        params["table"][jnp.asarray([1, 4])],
    )


def products(jaxpr: Any) -> Iterator[Any]:
    """The equations of products in a program, and in the programs inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS:
            yield eqn
        for body, _ in bodies(eqn):
            yield from products(body)


@pytest.mark.parametrize("name", CASES)
def test_all_products_have_the_precision_of_the_program(name: str) -> None:
    """Those of activations in both passes; those of factors alone are at full precision, as in merging."""
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    x = jnp.ones((5, 8))
    sites = jlora.trace(program, params, x)
    fits = {path: any(not method.unsupported_reason(sites[path]) for method in METHODS[name]) for path in params}
    targets = {path: fitting(name, sites[path]) if fits[path] else jlora.LoRA(1) for path in params}
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, targets, params=params))

    def step(adapter: Any, x: jax.Array) -> Any:
        outputs, pull = jax.vjp(lambda a, x: jlora.adapt(program, on_dense="allow")(params, a, x), adapter, x)
        return pull(outputs)

    jaxpr, _ = open_jaxpr(jax.make_jaxpr(step)(adapter, x))
    precisions = [(eqn.primitive.name, eqn.params["precision"]) for eqn in products(jaxpr)]
    assert len(precisions) > len(SHAPES)
    assert [pair for pair in precisions if pair[1] not in (FULL, (FULL, FULL))] == []
