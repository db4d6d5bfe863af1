"""The product of an activation with a low-rank factor, in a form that is fast on the CPU.

If such a product has several leading axes, (batch, time, in) x (in, rank), XLA's CPU backend copies an activation-sized
cotangent to compute the factor's gradient. It does not if the leading axes are flattened to one. So in programs for one
CPU device this product is a primitive that flattens them when it is lowered. In all other programs it is
`jax.lax.dot_general`: no primitive is bound if the default device is a GPU or a TPU, or if there is a mesh, and no
sharded axis is ever joined with another. A program that is traced on a CPU host and lowered for another platform
(`jax.export`) is not flattened either.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ir.sizes import is_static

Dims = tuple[tuple[int, ...], tuple[int, ...]]  # the contracted axes of both operands, pairwise


def rank_matmul(x: jax.Array, w: jax.Array, contracted: Dims, *, precision: Any, dtype: Any) -> jax.Array:
    """Contracts axes of `x` with axes of `w`; the result has the free axes of `x`, then those of `w`."""
    if not _compat.is_for_cpu(x, w):
        return lax.dot_general(x, w, (contracted, ((), ())), precision=precision, preferred_element_type=dtype)
    return rank_matmul_p.bind(x, w, contracted=contracted, precision=precision, dtype=dtype)


def _plain(x: jax.Array, w: jax.Array, *, contracted: Dims, precision: Any, dtype: Any) -> jax.Array:
    return lax.dot_general(x, w, (contracted, ((), ())), precision=precision, preferred_element_type=dtype)


def _flattened(x: jax.Array, w: jax.Array, *, contracted: Dims, precision: Any, dtype: Any) -> jax.Array:
    """The same with one free and one contracted axis for each operand, if these are contiguous."""
    if not all(_at_one_end(a.ndim, c) for a, c in zip((x, w), contracted, strict=True)):
        return _plain(x, w, contracted=contracted, precision=precision, dtype=dtype)
    free = [[n for k, n in enumerate(a.shape) if k not in c] for a, c in zip((x, w), contracted, strict=True)]
    flat, inner = [], []
    for a, c, sizes in zip((x, w), contracted, free, strict=True):
        two = [math.prod(a.shape[k] for k in c), math.prod(sizes)]
        inner.append((0,) if c[0] == 0 else (1,))
        flat.append(a.reshape(two if c[0] == 0 else two[::-1]))
    if inner == [(0,), (0,)] and _is_taller(*(a.shape[1] for a in flat)):
        # The gradient of a factor onto the rank. XLA's product of a tall, thin result takes four times as long as that
        # of the transposed one, and without the barrier it turns the latter into the former.
        y = _plain(*flat[::-1], contracted=(inner[1], inner[0]), precision=precision, dtype=dtype)
        y = lax.optimization_barrier(y).T
    else:
        y = _plain(*flat, contracted=(inner[0], inner[1]), precision=precision, dtype=dtype)
    return y.reshape([*free[0], *free[1]])


def _is_taller(rows: int, columns: int) -> bool:
    """Whether a result has more rows than columns; one of a symbolic size counts as square."""
    return is_static(rows) and is_static(columns) and rows > columns


def _at_one_end(ndim: int, axes: tuple[int, ...]) -> bool:
    """Whether axes are the first or the last of an array, in order."""
    return bool(axes) and axes in (tuple(range(len(axes))), tuple(range(ndim - len(axes), ndim)))


def _transpose_x(g: jax.Array, x: Any, w: jax.Array, *, contracted: Dims, precision: Any, dtype: Any) -> jax.Array:
    xc, wc = contracted
    shape = x.aval.shape
    w_free = tuple(k for k in range(w.ndim) if k not in wc)
    g_free = tuple(range(g.ndim - len(w_free), g.ndim))
    y = rank_matmul(g, w, (g_free, w_free), precision=precision, dtype=x.aval.dtype)
    # The axes of y: the free ones of x, then the contracted ones in the order of w.
    order = [k for k in range(len(shape)) if k not in xc] + [xc[wc.index(k)] for k in sorted(wc)]
    return _arrange(y, order)


def _transpose_w(g: jax.Array, x: jax.Array, w: Any, *, contracted: Dims, precision: Any, dtype: Any) -> jax.Array:
    xc, wc = contracted
    shape = w.aval.shape
    x_free = tuple(k for k in range(x.ndim) if k not in xc)
    y = rank_matmul(x, g, (x_free, tuple(range(len(x_free)))), precision=precision, dtype=w.aval.dtype)
    order = [wc[xc.index(k)] for k in sorted(xc)] + [k for k in range(len(shape)) if k not in wc]
    return _arrange(y, order)


def _arrange(y: jax.Array, order: list[int]) -> jax.Array:
    """Puts axis k of `y` at `order[k]`."""
    return y if order == sorted(order) else y.transpose([order.index(k) for k in range(len(order))])


def _batched(args: tuple[Any, Any], axes: tuple[Any, Any], **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(lambda x, w: _plain(x, w, **params), in_axes=axes)(*args), 0


def _abstract(x: Any, w: Any, *, contracted: Dims, precision: Any, dtype: Any) -> Any:
    free = [n for a, c in zip((x, w), contracted, strict=True) for k, n in enumerate(a.shape) if k not in c]
    return jax.typeof(jax.ShapeDtypeStruct(free, dtype))


def _lowered(ctx: Any, x: Any, w: Any, **params: Any) -> Any:
    fun = _flattened if _compat.is_single_device(ctx) else _plain
    return mlir.lower_fun(fun, multiple_results=False)(ctx, x, w, **params)


def eager(primitive: Primitive, plain: Callable[..., Any], static: Sequence[str]) -> Callable[..., Any]:
    """What runs a primitive outside of a program: compiled, unless `jax.disable_jit` forbids that."""
    compiled = jax.jit(primitive.bind, static_argnames=static)

    def run(*args: Any, **params: Any) -> Any:
        interpreted = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
        return (plain if interpreted else compiled)(*args, **params)

    return run


rank_matmul_p = Primitive("jlora_product")
rank_matmul_p.def_impl(eager(rank_matmul_p, _plain, ("contracted", "precision", "dtype")))
rank_matmul_p.def_abstract_eval(_abstract)
ad.defbilinear(rank_matmul_p, _transpose_x, _transpose_w)
batching.primitive_batchers[rank_matmul_p] = _batched
mlir.register_lowering(rank_matmul_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(rank_matmul_p, _lowered, platform="cpu")
