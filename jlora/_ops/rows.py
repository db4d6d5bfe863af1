"""Functions of rows, computed for one block of rows after the other, on the CPU.

XLA's CPU backend copies and transposes both operands and the result of a product whose batch axis, or contracted axis,
is between others. Each is as large as an activation, and more so in the backward pass. In a loop over blocks of rows
they are as large as a block, and stay in the caches. One loop computes all gradients of a function, and what it
computes of a block is not kept for the backward pass, but computed again. The gradient of x is written over x or over
the cotangent of y if nothing else needs that.

These are primitives, which only programs for one CPU device lower to loops. In all other programs they are the function
itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.sizes import is_static
from jlora._ops.matmul import eager

RowFunction = Callable[..., jax.Array]  # (x, *factors) -> y, hashable; equal ones share compiled programs

BLOCKS = 64  # at most
SMALLEST = 2**15  # numbers in a block of x or y: smaller blocks take longer


def by_rows(
    fun: RowFunction,
    x: jax.Array,
    *factors: jax.Array,
    axes: tuple[int, int],
    over: str = "",
    is_elementwise: bool = False,
) -> jax.Array:
    """`fun(x, *factors)`, in programs for one CPU by blocks of rows.

    Arguments:
        fun: a differentiable function; a row of its result depends on the same row of x, and no other.
        x: the activation.
        factors: arrays without rows.
        axes: the axis of the rows in x, and in the result.
        over: what the gradient of x is written over: "x", if nothing else uses x; "y", the cotangent of the result, if
            nothing else uses the result and both are alike; or nothing.
        is_elementwise: whether XLA can fuse the function into what uses its result: then only its gradients are
            computed by blocks.
    """
    if not (all(map(is_static, x.shape)) and _compat.is_for_cpu(x, *factors)):
        return fun(x, *factors)
    return rows_p.bind(x, *factors, form=_Form(fun, axes, over, is_elementwise))


@dataclasses.dataclass(frozen=True)
class _Form:
    """The function of a product by rows, and the other static arguments of `by_rows`."""

    fun: RowFunction
    axes: tuple[int, int]
    over: str
    is_elementwise: bool


def _count(x: jax.Array, y: Any, axis: int) -> int:
    return min(BLOCKS, x.shape[axis], max(math.prod(x.shape), math.prod(y.shape)) // SMALLEST)


def _loop(step: Callable[[Any, int, Any], Any], start: Any, rows: int, count: int) -> Any:
    """Runs `step(first row, number of rows, value)` for blocks of rows, the rest of the division first."""
    size, rest = rows // count, rows % count
    value = step(0, rest, start) if rest else start
    return lax.fori_loop(0, count, lambda k, value: step(rest + k * size, size, value), value)


def _room(like: Any, x: jax.Array) -> jax.Array:
    """An array that a loop over `x` writes: of a number in `x`, so that no program has it before it has `x`.

    Zeros would be one array for several loops, and in memory from the start.
    """
    return jnp.full(like.shape, x[(0,) * x.ndim], like.dtype)


def _plain(x: Any, *factors: Any, form: _Form) -> jax.Array:
    return form.fun(x, *factors)


def _by_blocks(x: jax.Array, *factors: jax.Array, form: _Form) -> jax.Array:
    y, (of_x, of_y) = jax.eval_shape(form.fun, x, *factors), form.axes
    count = _count(x, y, of_x)
    if form.is_elementwise or count < 2:
        return form.fun(x, *factors)

    def step(first: Any, size: int, y: jax.Array) -> jax.Array:
        block = form.fun(lax.dynamic_slice_in_dim(x, first, size, of_x), *factors)
        return lax.dynamic_update_slice_in_dim(y, block, first, of_y)

    return _loop(step, _room(y, x), x.shape[of_x], count)


def _gradients(g: Any, *operands: Any, form: _Form, needed: tuple[bool, ...]) -> list[jax.Array]:
    """The gradients of those operands that need one."""

    def fun(*some: Any) -> jax.Array:
        given = iter(some)
        return form.fun(*(next(given) if need else a for a, need in zip(operands, needed, strict=True)))

    return list(jax.vjp(fun, *(a for a, need in zip(operands, needed, strict=True) if need))[1](g))


def _gradients_by_blocks(g: Any, x: Any, *factors: Any, form: _Form, needed: tuple[bool, ...]) -> list[jax.Array]:
    of_x, of_y = form.axes
    count = _count(x, g, of_x)
    if count < 2 or (form.is_elementwise and not needed[0]):
        return _gradients(g, x, *factors, form=form, needed=needed)
    is_alike = (g.shape, g.dtype, of_y) == (x.shape, x.dtype, of_x)
    over_x, over_g = (needed[0] and form.over == name for name in "xy")
    over_g = over_g and is_alike

    def step(first: Any, size: int, value: Any) -> Any:
        gx, sums = value
        blocks = [
            lax.dynamic_slice_in_dim(a, first, size, axis)
            for a, axis in ((gx if over_g else g, of_y), (gx if over_x else x, of_x))
        ]
        # One call, so that the block is written after all that reads it: else XLA copies the whole array in every step.
        terms = _compat.call_apart(_block_gradients, form, needed, *blocks, *factors)
        if needed[0]:
            block, *terms = terms
            gx = lax.dynamic_update_slice_in_dim(gx, block, first, of_x)
        return gx, [total + term.astype(total.dtype) for total, term in zip(sums, terms, strict=True)]

    start = None if not needed[0] else g if over_g else x if over_x else _room(x, g)
    trained = [f for f, need in zip(factors, needed[1:], strict=True) if need]
    gx, sums = _loop(step, (start, list(map(_wide_zeros, trained))), x.shape[of_x], count)
    return [*([gx] if needed[0] else []), *(total.astype(f.dtype) for total, f in zip(sums, trained, strict=True))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block_gradients(form: _Form, needed: tuple[bool, ...], g: jax.Array, *operands: jax.Array) -> list[jax.Array]:
    return _gradients(g, *operands, form=form, needed=needed)


def _wide_zeros(like: jax.Array) -> jax.Array:
    return jnp.zeros(like.shape, accumulation_dtype(like.dtype))


def _tangent(*operands: Any, form: _Form) -> jax.Array:
    half = len(operands) // 2
    return jax.jvp(form.fun, operands[:half], operands[half:])[1]


def _jvp(primals: Any, tangents: Any, *, form: _Form) -> tuple[jax.Array, jax.Array]:
    return rows_p.bind(*primals, form=form), tangent_p.bind(*primals, *map(ad.instantiate_zeros, tangents), form=form)


def _transpose(g: Any, *operands: Any, form: _Form) -> list[Any]:
    half = len(operands) // 2
    primals, needed = operands[:half], tuple(map(ad.is_undefined_primal, operands[half:]))
    if isinstance(g, ad.Zero):
        return [None] * len(operands)
    results = iter(gradients_p.bind(g, *primals, form=form, needed=needed))
    return [*(None for _ in primals), *(next(results) if need else None for need in needed)]


def _derivative(fun: Callable[..., Any], /, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    return jax.jvp(functools.partial(fun, **params), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _batched(fun: Callable[..., Any], /, operands: Any, axes: Any, **params: Any) -> tuple[Any, Any]:
    results = jax.vmap(functools.partial(fun, **params), in_axes=axes)(*operands)
    return results, jax.tree.map(lambda _: 0, results)


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A function of rows under `jax.vmap`."""

    fun: RowFunction
    in_axes: tuple[int | None, ...]

    def __call__(self, *operands: jax.Array) -> jax.Array:
        return jax.vmap(self.fun, self.in_axes)(*operands)


def _batched_rows(operands: Any, mapped: Any, *, form: _Form) -> tuple[jax.Array, int]:
    """The mapped axis is one of rows too, if the factors do not have it."""
    moved = [a if k is None else jnp.moveaxis(a, k, 0) for a, k in zip(operands, mapped, strict=True)]
    in_axes = tuple(None if k is None else 0 for k in mapped)
    axes = form.axes[0] + (in_axes[0] == 0), form.axes[1] + 1
    if set(in_axes[1:]) <= {None} and moved[0].shape[0] > moved[0].shape[axes[0]]:
        axes = 0, 0
    return rows_p.bind(*moved, form=dataclasses.replace(form, fun=_Mapped(form.fun, in_axes), axes=axes)), 0


def _abstract(fun: Callable[..., Any], /, *operands: Any, **params: Any) -> Any:
    return jax.tree.map(jax.typeof, jax.eval_shape(functools.partial(fun, **params), *operands))


def _primitive(name: str, fun: Callable[..., Any], by_blocks: Callable[..., Any]) -> Primitive:
    """A primitive that computes a function, and in programs for one CPU device another form of it."""
    primitive = Primitive(name)
    primitive.multiple_results = several = fun is _gradients
    primitive.def_impl(eager(primitive, fun, ("form", "needed") if several else ("form",)))
    primitive.def_abstract_eval(functools.partial(_abstract, fun))
    ad.primitive_jvps[primitive] = functools.partial(_derivative, fun)
    batching.primitive_batchers[primitive] = functools.partial(_batched, fun)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        now = by_blocks if _compat.is_single_device(ctx) else fun
        return mlir.lower_fun(now, multiple_results=several)(ctx, *operands, **params)

    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=several))
    mlir.register_lowering(primitive, lower, platform="cpu")
    return primitive


rows_p = _primitive("jlora_rows", _plain, _by_blocks)
tangent_p = _primitive("jlora_rows_tangent", _tangent, _tangent)
gradients_p = _primitive("jlora_rows_gradients", _gradients, _gradients_by_blocks)
ad.primitive_jvps[rows_p] = _jvp
batching.primitive_batchers[rows_p] = _batched_rows
ad.primitive_transposes[tangent_p] = _transpose
