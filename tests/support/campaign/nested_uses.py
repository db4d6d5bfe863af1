"""Uses around other uses: functions inside functions, loops over layers, batches, derivatives and devices."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from tests.support import weight_uses
from tests.support.campaign.plan import Array, Inputs, Params, Scope, Step, Weight, require
from tests.support.campaign.uses import USES, use

_PLAIN = sorted(USES)


def inner(r: random.Random, w: Weight, s: Scope) -> Step:
    """Another use."""
    return USES[r.choice(_PLAIN)](r, w, s)


@use
def in_jit(r: random.Random, w: Weight, s: Scope) -> Step:
    return jax.jit(inner(r, w, s))


@use
def in_checkpoint(r: random.Random, w: Weight, s: Scope) -> Step:
    policy = r.choice([None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.everything_saveable])
    return jax.checkpoint(inner(r, w, s), policy=policy)


@use
def in_branch(r: random.Random, w: Weight, s: Scope) -> Step:
    fn, number = inner(r, w, s), s.ids((1,), 0, 2)
    return lambda a, p, x: lax.cond(x[number][0] > 0, fn, lambda a, p, x: -fn(a, p, x), a, p, x)


@use
def over_layers(r: random.Random, w: Weight, s: Scope) -> Step:
    """Each entry of the first axis is a layer's weight."""
    require(len(w.shape) >= 2 and w.shape[0] > 0)
    fn = inner(r, Weight(w.shape[1:], w.dtype), s)
    form = r.choice(["scan", "fori", "vmap", "unrolled", "while"])

    def layers(a: Array, p: Params, x: Inputs) -> Array:
        count = a.shape[0]
        if form == "scan":
            return lax.scan(lambda k, b: (k + 1, fn(b, p, x)), 0, a)[1]
        if form == "vmap":
            return jax.vmap(fn, (0, None, None))(a, p, x)
        if form == "unrolled":
            return jnp.stack([fn(b, p, x) for b in a])
        first = fn(a[0], p, x)
        if form == "fori":
            return lax.fori_loop(1, count, lambda k, y: y + fn(a[k], p, x), first)
        scanned = lax.scan(lambda c, k: ((c[0], c[1] + fn(c[0][k], p, x)), None), (a, first), jnp.arange(1, count))
        return scanned[0][1]

    return layers


@use
def recurrent(r: random.Random, w: Weight, s: Scope) -> Step:
    """The same weight in every step."""
    require(len(w.shape) == 2 and w.shape[0] == w.shape[1])
    name, remat = s.input((3, w.shape[0]), w.dtype), r.random() < 0.5

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        def body(h: Array, _: None) -> tuple[Array, None]:
            return x[name] + 0.2 * (h @ a), None

        return lax.scan(jax.checkpoint(body) if remat else body, x[name], length=3)[0]

    return fn


@use
def batched(r: random.Random, w: Weight, s: Scope) -> Step:
    """Over inputs, with one weight for all of them."""
    fn = inner(r, w, s)
    return lambda a, p, x: jax.vmap(fn, (None, None, 0))(a, p, jax.tree.map(lambda v: jnp.stack([v, jnp.flip(v)]), x))


@use
def gradient(r: random.Random, w: Weight, s: Scope) -> Step:
    """The derivative of a use with respect to an input."""
    fn = inner(r, w, s)
    names = [name for name, v in s.inputs.items() if jnp.issubdtype(v.dtype, jnp.floating)]
    require(bool(names))
    name, forward = r.choice(names), r.random() < 0.3

    def derivative(a: Array, p: Params, x: Inputs) -> Array:
        def of_input(v: Array) -> Array:
            y = fn(a, p, {**x, name: v})
            return y * y

        if forward:
            return jax.jvp(of_input, (x[name],), (x[name],))[1]
        return jax.grad(lambda v: jnp.sum(of_input(v).astype(jnp.float32)))(x[name])

    return derivative


@use
def in_shard_map(r: random.Random, w: Weight, s: Scope) -> Step:
    """The weight cut along one axis, or whole, and gathered inside if it was cut."""
    axes = [k for k, n in enumerate(w.shape) if n % 2 == 0 and n]
    k = r.choice([None, *axes])
    whole = inner(r, w, s)
    spec = PartitionSpec() if k is None else PartitionSpec(*[None] * k, "model")

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        def local(a: Array, p: Params, x: Inputs) -> Array:
            a = a if k is None else lax.all_gather(a, "model", axis=k, tiled=True)
            return whole(a, p, x)

        specs = (spec, PartitionSpec(), PartitionSpec())
        mapped = jax.shard_map(
            local, mesh=weight_uses.mesh(), in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return mapped(a, p, x)

    return fn


@use
def of_cut_rows(r: random.Random, w: Weight, s: Scope) -> Step:
    """A product whose contracted axis is cut over devices, summed by hand."""
    require(len(w.shape) == 2 and w.shape[0] % 2 == 0 and w.shape[0] > 0)
    name = s.input((3, w.shape[0]), w.dtype)

    def fn(a: Array, p: Params, x: Inputs) -> Array:
        specs = (PartitionSpec("model"), PartitionSpec(None, "model"))
        mapped = jax.shard_map(
            lambda a, v: lax.psum(v @ a, "model"), mesh=weight_uses.mesh(), in_specs=specs, out_specs=PartitionSpec()
        )
        return mapped(a, x[name])

    return fn
