"""Steps that change the numbers of a weight: sums, scales, products, rounding, and what has no factored form."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tests.support import weight_uses
from tests.support.campaign.plan import Array, Inputs, Params, Scope, Step, Weight, require
from tests.support.campaign.steps import a_partner, an_axis, simple, step


@step
def times_number(r: random.Random, w: Weight, s: Scope) -> Step:
    value, divided = r.choice([-1.5, 0.5, 2.0]), r.random() < 0.3
    return lambda a, p, x: a / value if divided else a * value


@step
def times_vector(r: random.Random, w: Weight, s: Scope) -> Step:
    k, divided = an_axis(r, w), r.random() < 0.3
    name = s.param((w.shape[k],), w.dtype)
    shape = [n if j == k else 1 for j, n in enumerate(w.shape)]

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        vector = p[name].reshape(shape)
        return a / (2 + vector * vector) if divided else a * vector

    return fn


@step
def times_matrix(r: random.Random, w: Weight, s: Scope) -> Step:
    name = s.param(w.shape, w.dtype)
    return lambda a, p, x: a * p[name]


@step
def times_input(r: random.Random, w: Weight, s: Scope) -> Step:
    """A gate that depends on the input, a scalar or one for each entry of an axis."""
    k, scalar = an_axis(r, w), r.random() < 0.5
    name = s.input((1 if scalar else w.shape[k],), w.dtype)
    shape = [n if j == k and not scalar else 1 for j, n in enumerate(w.shape)]
    return lambda a, p, x: a * x[name].reshape(shape)


@step
def times_integer(r: random.Random, w: Weight, s: Scope) -> Step:
    name = s.ids((1,), 1, 4)
    return lambda a, p, x: a * x[name][0].astype(a.dtype)


@step
def plus(r: random.Random, w: Weight, s: Scope) -> Step:
    other, minus = a_partner(r, w, s), r.random() < 0.5

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        b = jnp.flip(a, 0) if other is None and a.ndim else a if other is None else p[other]
        return b - a if minus else a + b

    return fn


@step
def interpolate(r: random.Random, w: Weight, s: Scope) -> Step:
    other, share = s.param(w.shape, w.dtype), s.param((), w.dtype)
    return lambda a, p, x: a + p[share] * (p[other] - a)


@step
def symmetric(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) == 2 and w.shape[0] == w.shape[1])
    return lambda a, p, x: a + a.T


@step
def product(r: random.Random, w: Weight, s: Scope) -> Step:
    """With another parameter or weight, on either side, or with itself."""
    require(len(w.shape) == 2 and w.dtype.itemsize > 1)
    fitting = [n for n, v in s.params.items() if len(v.shape) == 2 and v.dtype == w.dtype and v.shape[0] == w.shape[1]]
    name = r.choice([*fitting, s.param((w.shape[1], r.randint(2, 5)), w.dtype)])
    form = r.choice(["right", "right", "left", "gram"])
    left = s.param((r.randint(2, 5), w.shape[0]), w.dtype)
    forms: dict[str, Step] = {
        "right": lambda a, p, x: a @ p[name],
        "left": lambda a, p, x: p[left] @ a,
        "gram": lambda a, p, x: a @ a.T,
    }
    return forms[form]


@step
def shift(r: random.Random, w: Weight, s: Scope) -> Step:
    return lambda a, p, x: a + jnp.asarray(0.25, a.dtype)


# Rounding and integers.

F8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float4_e2m1fn")


@step
def round_trip(r: random.Random, w: Weight, s: Scope) -> Step:
    narrow = r.choice(["bfloat16", "float16", *F8])
    return lambda a, p, x: a.astype(narrow).astype(w.dtype)


@step
def cast(r: random.Random, w: Weight, s: Scope) -> Step:
    dtype = r.choice(["bfloat16", "float16", "float32"])
    return lambda a, p, x: a.astype(dtype)


@step
def reduce_precision(r: random.Random, w: Weight, s: Scope) -> Step:
    bits = r.choice([(8, 23), (8, 10), (8, 7), (5, 10), (8, 4), (4, 3), (5, 2)])
    return lambda a, p, x: lax.reduce_precision(a, *bits)


@step
def fake_quantised(r: random.Random, w: Weight, s: Scope) -> Step:
    """To integers and back, perhaps with a straight-through gradient."""
    straight = r.random() < 0.5
    bits = r.choice(["int8", "int4", "int32", "uint8"])

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        low = (a * 3).astype(bits).astype(a.dtype) / 3
        return a + lax.stop_gradient(low - a) if straight else low

    return fn


@step
def straight_through(r: random.Random, w: Weight, s: Scope) -> Step:
    narrow = r.choice(F8[:2])
    return lambda a, p, x: a + lax.stop_gradient(a.astype(narrow).astype(a.dtype) - a)


# What has no factored form.


def _softmax(a: Array) -> Array:
    return jax.nn.softmax(a, axis=-1)


def _normalised(a: Array) -> Array:
    return a / (0.5 + jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True)))


def _standardised(a: Array) -> Array:
    return (a - a.mean(0, keepdims=True)) / (0.5 + jnp.sqrt(jnp.square(a - a.mean(0, keepdims=True)).mean()))


def _masked(a: Array) -> Array:
    return jnp.where(jnp.arange(a.shape[-1]) % 2 == 0, a.reshape(-1, a.shape[-1]), 0).reshape(a.shape)


simple("negate", lambda a: -a)
simple("copy", jnp.copy)
simple("stop", lax.stop_gradient)
simple("half_stopped", lambda a: 0.5 * lax.stop_gradient(a) + a)
simple("barrier", lax.optimization_barrier)
simple("barrier_with_another", lambda a: lax.optimization_barrier((a, a + 1))[0])
simple("joined_twice", lambda a: lax.optimization_barrier([a, -a])[1])
simple("squeeze", lambda a: jnp.squeeze(a))
simple("tanh", jnp.tanh)
simple("square", jnp.square)
simple("power", lambda a: a**3)
simple("absolute", jnp.abs)
simple("clip", lambda a: jnp.clip(a, -0.5, 0.7))
simple("cumsum", lambda a: jnp.cumsum(a, axis=0))
simple("softmax", _softmax)
simple("normalised", _normalised)
simple("standardised", _standardised)
simple("masked", _masked)
simple("mean", lambda a: a - a.mean())
simple("maximum", lambda a: jnp.maximum(a, -a.T.T))
simple("sorted", lambda a: jnp.sort(a, axis=-1))
simple("lower_triangle", lambda a: jnp.tril(a))
simple("sum", lambda a: a.sum(0))


@step
def constrained(r: random.Random, w: Weight, s: Scope) -> Step:
    axes = [k for k, n in enumerate(w.shape) if n % 2 == 0]
    require(bool(axes))
    k = r.choice(axes)
    spec = PartitionSpec(*[None] * k, "model")
    return lambda a, p, x: lax.with_sharding_constraint(a, NamedSharding(weight_uses.mesh(), spec))
