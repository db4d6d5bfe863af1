"""Steps that move, cut, repeat and join the axes of a weight."""

from __future__ import annotations

import math
import random

import jax.numpy as jnp
from jax import lax

from tests.support.campaign.plan import Scope, Step, Weight, require
from tests.support.campaign.steps import a_partner, an_axis, step


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
    k = an_axis(r, w, 2)
    start = r.randrange(w.shape[k])
    index = (*[slice(None)] * k, slice(start, None, r.choice([1, 1, 2, -1, -2])))
    return lambda a, p, x: a[index]


@step
def dynamic_slice(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w, 2)
    size, start = r.randint(1, w.shape[k]), s.ids((1,), -2, w.shape[k] + 2)
    return lambda a, p, x: lax.dynamic_slice_in_dim(a, x[start][0], size, k)


@step
def one_of_a_stack(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w)
    require(len(w.shape) > 1)
    number = s.ids((1,), 0, w.shape[k])
    return lambda a, p, x: lax.dynamic_index_in_dim(a, x[number][0], k, keepdims=False)


@step
def rows(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w)
    ids = s.ids((r.randint(1, 4),), -1, w.shape[k] + 1)
    mode = r.choice(["clip", "wrap"])
    return lambda a, p, x: jnp.take(a, x[ids], axis=k, mode=mode)


@step
def pad(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w)
    config = [(r.randint(0, 2), r.randint(0, 2), r.randint(0, 1)) if j == k else (0, 0, 0) for j in range(len(w.shape))]
    value = r.choice([0.0, 0.0, 0.5])
    return lambda a, p, x: lax.pad(a, jnp.asarray(value, a.dtype), config)


@step
def split(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w, 2)
    at, part = r.randint(1, w.shape[k] - 1), r.randint(0, 1)
    return lambda a, p, x: jnp.split(a, [at], axis=k)[part]


@step
def roll(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w)
    return lambda a, p, x: jnp.roll(a, 1, axis=k)


@step
def flip(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w)
    return lambda a, p, x: jnp.flip(a, k)


@step
def tile(r: random.Random, w: Weight, s: Scope) -> Step:
    k = an_axis(r, w)
    return lambda a, p, x: jnp.tile(a, [2 if j == k else 1 for j in range(a.ndim)])


@step
def newan_axis(r: random.Random, w: Weight, s: Scope) -> Step:
    k, size = r.randint(0, len(w.shape)), r.choice([1, 1, 2])
    shape = (*w.shape[:k], size, *w.shape[k:])
    return lambda a, p, x: jnp.broadcast_to(jnp.expand_dims(a, k), shape)


@step
def concatenate(r: random.Random, w: Weight, s: Scope) -> Step:
    """With a parameter, with another weight, or with itself."""
    k, other = an_axis(r, w), a_partner(r, w, s)
    return lambda a, p, x: lax.concatenate([a, jnp.flip(a, k) if other is None else p[other]], k)


@step
def stack(r: random.Random, w: Weight, s: Scope) -> Step:
    k, other = r.randint(0, len(w.shape)), a_partner(r, w, s)
    return lambda a, p, x: jnp.stack([a, -a if other is None else p[other]], k)
