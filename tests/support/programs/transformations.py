"""Custom derivative and batching rules, batches and derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tests.support.programs.program import Side, Tree, Use, outside, program
from tests.support.programs.trees import bend, floats, is_float, layer, pair, plus, total, zeros

# Derivative and batching rules that a program defines itself.


@jax.custom_jvp
def _bend_jvp(y: jax.Array) -> jax.Array:
    return y * y


@_bend_jvp.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (y,), (dy,) = primals, tangents
    return _bend_jvp(y), 3 * dy  # not the derivative, so that a test sees whether the rule survives


@jax.custom_vjp
def _bend_vjp(y: jax.Array) -> jax.Array:
    return y * y


_bend_vjp.defvjp(lambda y: (_bend_vjp(y), y), lambda y, dy: (3 * y * dy,))


@program()
def custom_jvp(use: Use) -> Use:
    return lambda p, x: jax.tree.map(_bend_jvp, use(p, x))


@program()
def custom_vjp(use: Use) -> Use:
    return lambda p, x: jax.tree.map(_bend_vjp, use(p, x))


@program(materialised=True)
def custom_jvp_of_weights(use: Use) -> Use:
    fun = jax.custom_jvp(use)

    @fun.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        y, dy = jax.jvp(use, primals, tangents)
        return y, jax.tree.map(lambda d: 3 * d, dy)

    return fun


@program(materialised=True)
def custom_vjp_of_weights(use: Use) -> Use:
    fun = jax.custom_vjp(use)

    def backward(saved: Any, dy: Tree) -> Any:
        return jax.tree.map(lambda d: 3 * d if is_float(d) else d, jax.vjp(use, *saved)[1](dy))

    fun.defvjp(lambda p, x: (use(p, x), (p, x)), backward)
    return fun


@program(materialised=True, forward=True)
def custom_vmap_of_weights(use: Use) -> Use:
    fun = custom_vmap(use)

    @fun.def_vmap
    def _(size: int, batched: Any, p: Tree, x: Tree) -> Any:
        y = lax.map(functools.partial(use, p), x)
        return y, jax.tree.map(lambda _: True, y)

    return fun


# Batches.


@program(demanding=True)
def vmap(use: Use) -> Use:
    return lambda p, x: jax.vmap(use, (None, 0))(p, pair(x))


@program(copies=2)
def vmap_weights_and_inputs(use: Use) -> Use:
    return lambda p, x: jax.vmap(use)(p, pair(x))


@program(copies=2, demanding=True)
def vmap_in_vmap(use: Use) -> Use:
    """The weights are stacked along their last axes, the inputs along their first, the outputs along both."""

    def fun(p: Tree, x: Tree) -> Tree:
        last = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1), p)
        return jax.vmap(jax.vmap(use, (None, 0)), (-1, None), out_axes=-1)(last, pair(x))

    return fun


@outside(demanding=True)
def vmap_outside(side: Side) -> Side:
    return lambda p, adapter, x: jax.vmap(side, (None, None, 0))(p, adapter, pair(x))


@outside(adapters=2, demanding=True)
def vmap_over_adapters(side: Side) -> Side:
    return jax.vmap(side, (None, 0, None))


@outside()
def pmap_outside(side: Side) -> Side:
    return lambda p, adapter, x: jax.pmap(side, in_axes=(None, None, 0))(p, adapter, pair(x))


# Derivatives.


def _gradient(use: Use) -> Use:
    """The gradient of a loss with respect to the inputs."""

    def fun(p: Tree, x: Tree) -> Tree:
        some, back = floats(x)
        return jax.grad(lambda some: total(use(p, back(some))))(some)

    return fun


@program()
def grad(use: Use) -> Use:
    return _gradient(use)


@program()
def grad_of_grad(use: Use) -> Use:
    return _gradient(_gradient(use))


@program()
def jvp(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        some, back = floats(x)
        return jax.jvp(lambda some: use(p, back(some)), (some,), (bend(some),))

    return fun


@program(demanding=True)
def vmap_of_grad(use: Use) -> Use:
    """One gradient an example."""
    return lambda p, x: jax.vmap(_gradient(use), (None, 0))(p, pair(x))


@program(copies=2)
def grad_of_scanned_checkpoint(use: Use) -> Use:
    """The layers are scanned, and computed once more in the backward pass."""

    def fun(p: Tree, x: Tree) -> Tree:
        body = jax.checkpoint(lambda y, w: (plus(y, bend(use(w, x))), None), prevent_cse=False)
        return lax.scan(body, zeros(use, layer(p, 0), x), p)[0]

    return _gradient(fun)


@outside(forward=True)
def jvp_outside(side: Side) -> Side:
    return side


@outside(demanding=True)
def grad_outside(side: Side) -> Side:
    """The gradient with respect to the adapter, which the law then differentiates once more."""
    return lambda p, adapter, x: jax.grad(lambda adapter: total(side(p, adapter, x)))(adapter)
