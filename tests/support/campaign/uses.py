"""How a random program uses a weight: products, convolutions, lookups, experts, loops, and other uses."""

from __future__ import annotations

import math
import random
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.campaign.plan import Array, Build, Inputs, Params, Scope, Step, Weight, after, require

USES: dict[str, Build] = {}


def use(build: Build) -> Build:
    """Adds a use to the catalogue."""
    USES[build.__name__] = build
    return build


def _input_dtype(r: random.Random, w: Weight) -> Any:
    """The weight's dtype as a rule; a narrow weight meets a wider input, or an input of integers."""
    return r.choice([w.dtype, w.dtype, w.dtype, "float32", "bfloat16", "float16"])


@use
def product(r: random.Random, w: Weight, s: Scope) -> Step:
    """`lax.dot_general` with the weight on either side, any axes contracted, some batched."""
    axes = r.sample(range(len(w.shape)), len(w.shape))
    require(bool(axes))
    n_in = r.randint(1, max(1, len(axes) - 1))
    n_batch = r.randint(0, max(0, len(axes) - n_in - 1)) if r.random() < 0.4 else 0
    inner, batch = axes[:n_in], axes[n_in : n_in + n_batch]
    labels = [*inner, *batch, -1]
    order = r.sample(labels, len(labels))
    name = s.input(tuple(3 if k < 0 else w.shape[k] for k in order), _input_dtype(r, w))
    x_in, x_batch = [order.index(k) for k in inner], [order.index(k) for k in batch]
    wide = r.choice([None, None, "float32"])
    first = r.random() < 0.5

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        if first:
            return lax.dot_general(a, x[name], ((inner, x_in), (batch, x_batch)), preferred_element_type=wide)
        return lax.dot_general(x[name], a, ((x_in, inner), (x_batch, batch)), preferred_element_type=wide)

    return fn


@use
def matmul(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) >= 2)
    name = s.input((*w.shape[:-2], r.choice([1, 4]), w.shape[-2]), w.dtype)
    return lambda a, p, x: x[name] @ a


@use
def einsum_of_three(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) == 2)
    left, right = s.input((3, w.shape[0]), w.dtype), s.input((3, w.shape[1]), w.dtype)
    text = r.choice(["bi,io,bo->b", "bi,io,co->bc", "bi,io,bo->bo", "bi,io,bo->"])
    return lambda a, p, x: jnp.einsum(text, x[left], a, x[right])


@use
def of_integers(r: random.Random, w: Weight, s: Scope) -> Step:
    """Inputs of eight bits, multiplied as they are."""
    require(len(w.shape) == 2)
    name = s.ids((3, w.shape[0]), -4, 5)

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        numbers = x[name].astype(jnp.int8)
        return lax.dot_general(numbers, a, (((1,), (0,)), ((), ())), preferred_element_type=a.dtype)

    return fn


@use
def one_hot(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) >= 2)
    name, size = s.ids((4,), -1, w.shape[0] + 1), w.shape[0]
    return lambda a, p, x: jnp.tensordot(jax.nn.one_hot(x[name], size, dtype=a.dtype), a, 1)


@use
def convolution(r: random.Random, w: Weight, s: Scope) -> Step:
    require(3 <= len(w.shape) <= 5 and math.prod(w.shape) > 0)
    spec = r.sample(range(len(w.shape)), len(w.shape))  # out, in, window
    groups = r.choice([g for g in (1, 2, 3) if w.shape[spec[0]] % g == 0])
    channels, windows = groups * w.shape[spec[1]], [w.shape[k] for k in spec[2:]]
    name = s.input((2, channels, *(n + r.randint(0, 2) for n in windows)), w.dtype)
    strides = [r.randint(1, 2) for _ in windows]
    numbers = lax.ConvDimensionNumbers(tuple(range(len(w.shape))), tuple(spec), tuple(range(len(w.shape))))
    padding, stretch = r.choice(["SAME", "VALID"]), [r.choice([1, 1, 2]) for _ in windows]
    stretch = stretch if padding == "SAME" else [1] * len(windows)
    return lambda a, p, x: lax.conv_general_dilated(
        x[name], a, strides, padding, None, stretch, numbers, feature_group_count=groups
    )


@use
def lookup(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) >= 2 and min(w.shape) > 0)
    k, mode = r.randrange(len(w.shape)), r.choice(["fill", "clip", "wrap", "promise_in_bounds"])
    slack = 0 if mode == "promise_in_bounds" else 2
    ids = s.ids(r.choice([(3,), (2, 2)]), -slack, w.shape[k] + slack)
    fill = 0.5 if mode == "fill" else None
    gate = s.input((1,), w.dtype)

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        index = (*[slice(None)] * k, x[ids])
        taken = a.at[index].get(mode=mode, fill_value=fill)
        return taken * x[gate].reshape([1] * taken.ndim)

    return fn


@use
def tied(r: random.Random, w: Weight, s: Scope) -> Step:
    """An embedding that is the head too."""
    require(len(w.shape) == 2 and min(w.shape) > 0)
    ids, name = s.ids((3,), 0, w.shape[0]), s.input((3, w.shape[1]), w.dtype)
    return lambda a, p, x: (a[x[ids]] + x[name]) @ a.T


@use
def sliced_row(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) == 2 and min(w.shape) > 0)
    start, gate = s.ids((1,), -1, w.shape[0] + 1), s.input((1, w.shape[1]), w.dtype)
    return lambda a, p, x: lax.dynamic_slice(a, (x[start][0], jnp.int32(0)), (1, a.shape[1])) * x[gate]


@use
def experts(r: random.Random, w: Weight, s: Scope) -> Step:
    require(len(w.shape) == 3 and min(w.shape) > 0)
    counts = [r.randint(0, 3) for _ in range(w.shape[0])]
    name, group = s.input((sum(counts) + r.randint(0, 2), w.shape[1]), w.dtype), s.ids((w.shape[0],), 0, 1)
    sizes = jnp.asarray(counts, jnp.int32)
    return lambda a, p, x: lax.ragged_dot(x[name], a, x[group] + sizes)


@use
def weights_alone(r: random.Random, w: Weight, s: Scope) -> Step:
    """A norm, or a product entry by entry."""
    name = s.input((1,), w.dtype)
    form = r.choice(["norm", "entries", "output"])
    forms: dict[str, Step] = {
        "norm": lambda a, p, x: x[name] * jnp.sqrt(jnp.sum(a * a)),
        "entries": lambda a, p, x: a * x[name].reshape([1] * a.ndim),
        "output": lambda a, p, x: a,
    }
    return forms[form]


@use
def of_outputs(r: random.Random, w: Weight, s: Scope) -> Step:
    """Two uses of one weight, multiplied with each other."""
    require(len(w.shape) == 2)
    name = s.input((3, w.shape[0]), w.dtype)
    return lambda a, p, x: (x[name] @ a) @ (x[name] @ a).T


def output(step: Step, w: Weight, s: Scope) -> Weight:
    """The shape of what a use returns, which must be floating-point numbers of a common size."""
    out = after(step, w, s)
    require(jnp.issubdtype(out.dtype, jnp.floating) and 0 < math.prod(out.shape) <= 4000)
    return out
