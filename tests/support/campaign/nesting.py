"""Steps around other steps: functions inside functions, branches, loops, batches and rules of a program's own."""

from __future__ import annotations

import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.campaign import arithmetic, structure  # noqa: F401
from tests.support.campaign.plan import Array, Inputs, Params, Scope, Step, Weight, after, require
from tests.support.campaign.steps import STEPS, step

_PLAIN = sorted(STEPS)  # those of the other modules


def inner(r: random.Random, w: Weight, s: Scope) -> Step:
    """Another step, or two of them."""
    first = STEPS[r.choice(_PLAIN)](r, w, s)
    if r.random() < 0.5:
        return first
    second = STEPS[r.choice(_PLAIN)](r, after(first, w, s), s)
    return lambda a, p, x: second(first(a, p, x), p, x)


def keeping(r: random.Random, w: Weight, s: Scope) -> Step:
    """A step that returns what has the shape and dtype of the weight."""
    fn = inner(r, w, s)
    out = after(fn, w, s)
    require((out.shape, out.dtype) == (w.shape, w.dtype))
    return fn


def around(name: str, wrap: Callable[[Step], Step]) -> None:
    """Adds a step that wraps another one."""
    STEPS[name] = lambda r, w, s: wrap(inner(r, w, s))


around("jitted", lambda fn: lambda a, p, x: jax.jit(fn)(a, p, x))
around("jitted_closure", lambda fn: lambda a, p, x: jax.jit(lambda x: fn(a, p, x), inline=True)(x))
around("checkpointed", jax.checkpoint)
around("named", lambda fn: lambda a, p, x: jax.named_call(fn, name="inner")(a, p, x))


@step
def vmapped(r: random.Random, w: Weight, s: Scope) -> Step:
    """Along any axis."""
    require(len(w.shape) > 1)
    k = r.randrange(len(w.shape))
    fn = inner(r, Weight((*w.shape[:k], *w.shape[k + 1 :]), w.dtype), s)
    return lambda a, p, x: jax.vmap(fn, (k, None, None))(a, p, x)


@step
def branches(r: random.Random, w: Weight, s: Scope) -> Step:
    """A branch that the input chooses; the other one negates."""
    fn, number, several = keeping(r, w, s), s.ids((1,), 0, 3), r.random() < 0.5

    def choose(a: Array, p: Params, x: Inputs) -> Array:
        if several:
            return lax.switch(x[number][0], [fn, lambda a, p, x: -a, lambda a, p, x: 2 * a], a, p, x)
        return lax.cond(x[number][0] > 0, lambda a: fn(a, p, x), lambda a: -a, a)

    return choose


@step
def selected(r: random.Random, w: Weight, s: Scope) -> Step:
    fn, number = keeping(r, w, s), s.ids((1,), 0, 2)
    return lambda a, p, x: jnp.where(x[number][0] > 0, fn(a, p, x), a)


@step
def repeated(r: random.Random, w: Weight, s: Scope) -> Step:
    fn, form = keeping(r, w, s), r.choice(["scan", "fori", "unrolled"])

    def fn_twice(a: Array, p: Params, x: Inputs) -> Array:
        if form == "scan":
            return lax.scan(lambda a, _: (fn(a, p, x), None), a, length=2)[0]
        if form == "fori":
            return lax.fori_loop(0, 2, lambda _, a: fn(a, p, x), a)
        return fn(fn(a, p, x), p, x)

    return fn_twice


@step
def scanned(r: random.Random, w: Weight, s: Scope) -> Step:
    """Every entry of the first axis on its own, in a loop that stacks what it returns."""
    require(len(w.shape) > 1 and w.shape[0] > 0)
    fn, back = inner(r, Weight(w.shape[1:], w.dtype), s), r.random() < 0.5
    return lambda a, p, x: lax.scan(lambda k, b: (k + 1, fn(b, p, x)), 0, a, reverse=back)[1]


@step
def looped(r: random.Random, w: Weight, s: Scope) -> Step:
    """A loop that carries the weight beside a sum of its entries."""
    fn = keeping(r, w, s)

    def loop(a: Array, p: Params, x: Inputs) -> Array:
        def body(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            a, total = carry
            return (a, total + 0.5 * fn(a, p, x)), None

        return lax.scan(body, (a, jnp.zeros_like(a)), length=2)[0][1]

    return loop


@step
def custom_jvp(r: random.Random, w: Weight, s: Scope) -> Step:
    """With a rule that is not the derivative."""
    fn = inner(r, w, s)

    def ruled(a: Array, p: Params, x: Inputs) -> Array:
        own = jax.custom_jvp(fn)
        own.defjvp(lambda primals, tangents: (own(*primals), 3 * jax.jvp(fn, primals, tangents)[1]))
        return own(a, p, x)

    return ruled


@step
def custom_vjp(r: random.Random, w: Weight, s: Scope) -> Step:
    fn = inner(r, w, s)

    def ruled(a: Array, p: Params, x: Inputs) -> Array:
        own = jax.custom_vjp(fn)

        def backward(saved: tuple[Array, Params, Inputs], dy: Array) -> tuple[Array, None, None]:
            a, p, x = saved
            return 3 * jax.vjp(lambda a: fn(a, p, x), a)[1](dy)[0], None, None

        own.defvjp(lambda a, p, x: (own(a, p, x), (a, p, x)), backward)
        return own(a, p, x)

    return ruled
