"""Functions inside functions, rematerialisation, branches and loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.support.programs.program import PROGRAMS, Program, Tree, Use, program, same
from tests.support.programs.trees import bend, layer, plus, sign, vary, zeros

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


@program(materialised=True)
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

    PROGRAMS.append(Program(f"checkpoint_{name}", build, same))


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
