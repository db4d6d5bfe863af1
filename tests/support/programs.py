"""Kinds of program: what stands between a parameter and its use.

A program takes `use(params, inputs) -> y` and gives another function of parameters and inputs. `around` stands outside
of the law's two sides instead: it takes `side(params, adapter, inputs)` and gives a function of the same arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from tests.support import weight_uses

Tree = Any
Use = Callable[[Any, Any], Any]
Side = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """One way to run what uses a weight.

    Arguments:
        name: the function's name.
        build: `build(use) -> fun`, with `fun(params, inputs) -> y`.
        around: `around(side) -> side`, applied to both sides of the law.
        copies: how many stacked copies of every parameter `fun` takes; zero for the parameters themselves.
        adapters: how many stacked adapters `around` takes; zero for one adapter.
        forward: whether JAX differentiates it in forward mode alone.
        formed: whether it asks for the weight itself, so that the weight is rightly formed.
        demanding: whether it needs batching rules or second derivatives, which JAX may lack.
    """

    name: str
    build: Callable[[Use], Use]
    around: Callable[[Side], Side]
    copies: int = 0
    adapters: int = 0
    forward: bool = False
    formed: bool = False
    demanding: bool = False

    def stacked(self, adapter: Any) -> Any:
        """The shapes of as many adapters as the program takes."""
        lead = (self.adapters,) if self.adapters else ()
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype), adapter)


PROGRAMS: list[Program] = []


def _same(fun: Any) -> Any:
    return fun


def program(**options: Any) -> Callable[[Callable[[Use], Use]], Callable[[Use], Use]]:
    """Registers `build`."""

    def register(build: Callable[[Use], Use]) -> Callable[[Use], Use]:
        PROGRAMS.append(Program(build.__name__, build, _same, **options))
        return build

    return register


def outside(**options: Any) -> Callable[[Callable[[Side], Side]], Callable[[Side], Side]]:
    """Registers `around`."""

    def register(around: Callable[[Side], Side]) -> Callable[[Side], Side]:
        PROGRAMS.append(Program(around.__name__, _same, around, **options))
        return around

    return register


def is_float(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating)


def total(tree: Tree) -> jax.Array:
    """A number that depends on every output, in a way that second derivatives see."""
    return functools.reduce(jnp.add, [jnp.sum(bend(a.astype(jnp.float32))) for a in jax.tree.leaves(tree)])


def vary(x: Tree, k: Any) -> Tree:
    """The inputs as step `k` of a loop sees them; whole numbers (rows of a table) stay as they are."""
    return jax.tree.map(lambda a: a * jnp.asarray(1 + 0.25 * k, a.dtype) if is_float(a) else a, x)


def pair(x: Tree) -> Tree:
    """Two inputs, stacked."""
    return jax.tree.map(lambda a: jnp.stack([a, jnp.roll(a, 1, axis=-1)]), x)


def bend(tree: Tree) -> Tree:
    """A nonlinearity that compiles in no time."""
    return jax.tree.map(lambda y: y * y, tree)


def plus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def zeros(use: Use, params: Tree, x: Tree) -> Tree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(use, params, x))


def layer(params: Tree, k: Any) -> Tree:
    return jax.tree.map(lambda a: a[k], params)


def sign(x: Tree) -> jax.Array:
    """A predicate that the inputs decide."""
    return next(jnp.sum(a) > 0 for a in jax.tree.leaves(x) if is_float(a))


def floats(x: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The inputs that can be differentiated, and how to put them back."""
    some = {k: a for k, a in x.items() if is_float(a)}
    return some, lambda new: {**x, **new}


# Functions inside functions.


@program()
def bare(use: Use) -> Use:
    return use


@program()
def jit_in_jit(use: Use) -> Use:
    """Weights are handed over in one call, and closed over in another."""
    handed = jax.jit(use)

    def fun(p: Tree, x: Tree) -> Tree:
        closed = jax.jit(lambda x: use(p, x), inline=True)
        return plus(handed(p, x), bend(closed(vary(x, 1))))

    return jax.jit(fun)


@program()
def named_and_printed(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        with jax.named_scope("outer"):
            y = jax.named_call(use, name="inner")(p, x)
        jax.debug.print("{}", jax.tree.leaves(y)[0].sum())
        return y

    return fun


@program()
def platform_dependent(use: Use) -> Use:
    return lambda p, x: lax.platform_dependent(p, x, cpu=use, default=lambda p, x: bend(use(p, x)))


@program(formed=True)
def handed_out(use: Use) -> Use:
    """The weights are outputs, too."""
    return lambda p, x: (use(p, x), p)


# Rematerialisation.


@program()
def checkpoint(use: Use) -> Use:
    return jax.checkpoint(lambda p, x: bend(use(p, x)))


def _policy(name: str, policy: Any) -> None:
    def build(use: Use) -> Use:
        inner = jax.checkpoint(lambda p, x: jax.tree.map(lambda a: checkpoint_name(a, "y"), use(p, x)), policy=policy)
        return lambda p, x: bend(inner(p, x))

    PROGRAMS.append(Program(f"checkpoint_{name}", build, _same))


_policies = jax.checkpoint_policies
_policy("dots", _policies.dots_with_no_batch_dims_saveable)
_policy("names", _policies.save_only_these_names("y"))


# Branches.


@program()
def cond(use: Use) -> Use:
    return lambda p, x: lax.cond(sign(x), use, lambda p, x: bend(use(p, x)), p, x)


@program()
def switch_closure(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        branches = [lambda x: use(p, x), lambda x: bend(use(p, x)), lambda x: plus(use(p, vary(x, 1)), use(p, x))]
        return lax.switch(sign(x).astype(jnp.int32) + 1, branches, x)

    return fun


# Loops.


@program()
def scan(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        def body(y: Tree, k: Any) -> Any:
            return plus(y, bend(use(p, vary(x, k)))), None

        return lax.scan(body, zeros(use, p, x), jnp.arange(3.0))[0]

    return fun


@program()
def scan_carried(use: Use) -> Use:
    """The weights go through the loop's carry, untouched."""

    def fun(p: Tree, x: Tree) -> Tree:
        def body(carry: Any, k: Any) -> Any:
            p, y = carry
            return (p, plus(y, use(p, vary(x, k)))), None

        return lax.scan(body, (p, zeros(use, p, x)), jnp.arange(2.0))[0][1]

    return fun


@program()
def scan_carried_and_scaled(use: Use) -> Use:
    """The weights go through the loop's carry, and every step halves them."""

    def fun(p: Tree, x: Tree) -> Tree:
        def body(carry: Any, _: Any) -> Any:
            p, y = carry
            p = jax.tree.map(lambda w: 0.5 * w, p)
            return (p, plus(y, use(p, x))), None

        return lax.scan(body, (p, zeros(use, p, x)), length=2)[0][1]

    return fun


@program(copies=2)
def scan_layers(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        return lax.scan(lambda y, w: (plus(y, bend(use(w, x))), None), zeros(use, layer(p, 0), x), p)[0]

    return fun


@program(copies=2)
def scan_layers_reversed(use: Use) -> Use:
    """The layers' outputs are stacked."""
    return lambda p, x: lax.scan(lambda k, w: (k + 1, use(w, vary(x, k))), 0.0, p, reverse=True, unroll=2)[1]


@program()
def fori_loop(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        return lax.fori_loop(0, 2, lambda k, y: plus(y, use(p, vary(x, k.astype(jnp.float32)))), zeros(use, p, x))

    return fun


@program(forward=True)
def fori_loop_of_unknown_length(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        stop = 1 + sign(x).astype(jnp.int32)
        return lax.fori_loop(0, stop, lambda k, y: plus(y, use(p, vary(x, k.astype(jnp.float32)))), zeros(use, p, x))

    return fun


@program(copies=2)
def fori_loop_over_layers(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        return lax.fori_loop(0, 2, lambda k, y: plus(y, use(layer(p, k), x)), zeros(use, layer(p, 0), x))

    return fun


@program(forward=True)
def while_loop_carried(use: Use) -> Use:
    def fun(p: Tree, x: Tree) -> Tree:
        def body(state: Any) -> Any:
            k, p, y = state
            return k + 1, p, plus(y, use(p, vary(x, k)))

        return lax.while_loop(lambda state: state[0] < 2, body, (0.0, p, zeros(use, p, x)))[2]

    return fun


# Rules of the user's own.


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


@program(formed=True)
def custom_jvp_of_weights(use: Use) -> Use:
    fun = jax.custom_jvp(use)

    @fun.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        y, dy = jax.jvp(use, primals, tangents)
        return y, jax.tree.map(lambda d: 3 * d, dy)

    return fun


@program(formed=True)
def custom_vjp_of_weights(use: Use) -> Use:
    fun = jax.custom_vjp(use)

    def backward(saved: Any, dy: Tree) -> Any:
        return jax.tree.map(lambda d: 3 * d if is_float(d) else d, jax.vjp(use, *saved)[1](dy))

    fun.defvjp(lambda p, x: (use(p, x), (p, x)), backward)
    return fun


@program(formed=True, forward=True)
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


# Devices.


def _shard_map(fun: Callable[..., Any], specs: Any, out: PartitionSpec, **options: Any) -> Callable[..., Any]:
    return jax.shard_map(fun, mesh=weight_uses.mesh(), in_specs=specs, out_specs=out, **options)


@program()
def shard_map(use: Use) -> Use:
    """Weights on every device, inputs cut over two."""
    specs = (PartitionSpec(), PartitionSpec("model"))
    inner = _shard_map(lambda p, x: _lead(use(p, layer(x, 0))), specs, PartitionSpec("model"))
    return lambda p, x: inner(p, pair(x))


@program(copies=2)
def shard_map_of_cut_weights(use: Use) -> Use:
    """Each device has a layer, and inputs, of its own."""
    specs = (PartitionSpec("model"), PartitionSpec("model"))
    inner = _shard_map(lambda p, x: _lead(use(layer(p, 0), layer(x, 0))), specs, PartitionSpec("model"))
    return lambda p, x: inner(p, pair(x))


@program(copies=2)
def shard_map_of_gathered_weights(use: Use) -> Use:
    """Each device keeps a piece, and collects the whole before it is used."""

    def local(p: Tree, x: Tree) -> Tree:
        whole = jax.tree.map(lambda a: lax.all_gather(a, "model", tiled=True), p)
        return plus(use(layer(whole, 0), x), bend(use(layer(whole, 1), x)))

    specs = (PartitionSpec("model"), PartitionSpec())
    return _shard_map(local, specs, PartitionSpec(), check_vma=False)


@program(copies=2)
def shard_map_of_one_axis(use: Use) -> Use:
    """The other axis of the mesh is left to the compiler."""
    specs = (PartitionSpec("model"), PartitionSpec("model"))
    inner = _shard_map(
        lambda p, x: _lead(bend(use(layer(p, 0), layer(x, 0)))), specs, PartitionSpec("model"), axis_names={"model"}
    )
    return lambda p, x: jax.jit(inner)(p, pair(x))


def _lead(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: a[None], tree)
