"""What a random program does to a weight before it uses it: structure, numbers and rounding."""

from __future__ import annotations

import math
import random
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tests.support import weight_uses
from tests.support.campaign.plan import Array, Build, Inputs, Params, Scope, Step, Weight, require

LARGEST = 600  # entries of a weight

STEPS: dict[str, Build] = {}


def step(build: Build) -> Build:
    """Adds a step to the catalogue."""
    STEPS[build.__name__] = build
    return build


def simple(name: str, fn: Any) -> None:
    """Adds a step that draws nothing."""
    STEPS[name] = lambda r, w, s: lambda a, p, x: fn(a)


def _axis(r: random.Random, w: Weight, least: int = 1) -> int:
    axes = [k for k, n in enumerate(w.shape) if n >= least]
    require(bool(axes))
    return r.choice(axes)


# Structure.


@step
def transpose(r: random.Random, w: Weight, s: Scope) -> Step:
    order = r.sample(range(len(w.shape)), len(w.shape))
    return lambda a, p, x: a.transpose(order)


@step
def reshape(r: random.Random, w: Weight, s: Scope) -> Step:
    """The prime factors of the sizes, in groups."""
    primes = [q for n in w.shape for q in _primes(n)]
    require(bool(primes))
    cuts = sorted(r.sample(range(1, len(primes)), r.randint(0, min(3, len(primes) - 1))))
    shape = [math.prod(primes[a:b]) for a, b in zip([0, *cuts], [*cuts, len(primes)], strict=True)]
    return lambda a, p, x: a.reshape(shape)


def _primes(n: int) -> list[int]:
    for q in range(2, n):
        if n % q == 0:
            return [q, *_primes(n // q)]
    return [n] if n > 1 else []


@step
def cut(r: random.Random, w: Weight, s: Scope) -> Step:
    """A slice with a stride, perhaps a negative one."""
    k = _axis(r, w, 2)
    start = r.randrange(w.shape[k])
    index = (*[slice(None)] * k, slice(start, None, r.choice([1, 1, 2, -1, -2])))
    return lambda a, p, x: a[index]


@step
def dynamic_slice(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w, 2)
    size, start = r.randint(1, w.shape[k]), s.ids((1,), -2, w.shape[k] + 2)
    return lambda a, p, x: lax.dynamic_slice_in_dim(a, x[start][0], size, k)


@step
def one_of_a_stack(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w)
    require(len(w.shape) > 1)
    number = s.ids((1,), 0, w.shape[k])
    return lambda a, p, x: lax.dynamic_index_in_dim(a, x[number][0], k, keepdims=False)


@step
def rows(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w)
    ids = s.ids((r.randint(1, 4),), -1, w.shape[k] + 1)
    mode = r.choice(["clip", "wrap"])
    return lambda a, p, x: jnp.take(a, x[ids], axis=k, mode=mode)


@step
def pad(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w)
    config = [(r.randint(0, 2), r.randint(0, 2), r.randint(0, 1)) if j == k else (0, 0, 0) for j in range(len(w.shape))]
    value = r.choice([0.0, 0.0, 0.5])
    return lambda a, p, x: lax.pad(a, jnp.asarray(value, a.dtype), config)


@step
def split(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w, 2)
    at, part = r.randint(1, w.shape[k] - 1), r.randint(0, 1)
    return lambda a, p, x: jnp.split(a, [at], axis=k)[part]


@step
def roll(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w)
    return lambda a, p, x: jnp.roll(a, 1, axis=k)


@step
def flip(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w)
    return lambda a, p, x: jnp.flip(a, k)


@step
def tile(r: random.Random, w: Weight, s: Scope) -> Step:
    k = _axis(r, w)
    return lambda a, p, x: jnp.tile(a, [2 if j == k else 1 for j in range(a.ndim)])


@step
def new_axis(r: random.Random, w: Weight, s: Scope) -> Step:
    k, size = r.randint(0, len(w.shape)), r.choice([1, 1, 2])
    shape = (*w.shape[:k], size, *w.shape[k:])
    return lambda a, p, x: jnp.broadcast_to(jnp.expand_dims(a, k), shape)


@step
def concatenate(r: random.Random, w: Weight, s: Scope) -> Step:
    """With a parameter, with another weight, or with itself."""
    k, other = _axis(r, w), _partner(r, w, s)
    return lambda a, p, x: lax.concatenate([a, jnp.flip(a, k) if other is None else p[other]], k)


@step
def stack(r: random.Random, w: Weight, s: Scope) -> Step:
    k, other = r.randint(0, len(w.shape)), _partner(r, w, s)
    return lambda a, p, x: jnp.stack([a, -a if other is None else p[other]], k)


def _partner(r: random.Random, w: Weight, s: Scope) -> str | None:
    """Another parameter of the same shape, an adapted one if there is any; None for the weight itself."""
    same = [name for name, other in s.params.items() if (other.shape, other.dtype) == (w.shape, w.dtype)]
    options = [None, s.param(w.shape, w.dtype)] if w.dtype.itemsize > 1 else [None]
    return r.choice([*options, *same])


# Arithmetic.


@step
def times_number(r: random.Random, w: Weight, s: Scope) -> Step:
    value, divided = r.choice([-1.5, 0.5, 2.0]), r.random() < 0.3
    return lambda a, p, x: a / value if divided else a * value


@step
def times_vector(r: random.Random, w: Weight, s: Scope) -> Step:
    k, divided = _axis(r, w), r.random() < 0.3
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
    k, scalar = _axis(r, w), r.random() < 0.5
    name = s.input((1 if scalar else w.shape[k],), w.dtype)
    shape = [n if j == k and not scalar else 1 for j, n in enumerate(w.shape)]
    return lambda a, p, x: a * x[name].reshape(shape)


@step
def times_integer(r: random.Random, w: Weight, s: Scope) -> Step:
    name = s.ids((1,), 1, 4)
    return lambda a, p, x: a * x[name][0].astype(a.dtype)


@step
def plus(r: random.Random, w: Weight, s: Scope) -> Step:
    other, minus = _partner(r, w, s), r.random() < 0.5

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
