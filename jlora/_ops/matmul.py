"""The product of an activation with a low-rank factor, in a form that is fast on the CPU.

If such a product has several leading axes, (batch, time, in) x (in, rank), XLA's CPU backend copies an activation-sized
cotangent to compute the factor's gradient. It does not if the leading axes are flattened to one. So in programs for one
CPU device this product is a primitive that flattens them when it is lowered. In all other programs it is
`jax.lax.dot_general`: no primitive is bound if the default device is a GPU or a TPU, or if there is a mesh, and no
sharded axis is ever joined with another. A program that is traced on a CPU host and lowered for another platform
(`jax.export`) is not flattened either.

Under `jax.vmap` over activations and factors, as for a bank of adapters, the product has axes of a batch. It flattens
to (members, batch * time, in), and the product with the weight, which is not mapped, to (members * batch * time, in).
XLA's CPU backend fuses each of the two reshapes into what computes the activation, and would store it twice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ir.sizes import is_static

Dims = tuple[tuple[int, ...], tuple[int, ...]]  # the contracted axes of both operands, pairwise


def rank_matmul(
    x: jax.Array, w: jax.Array, contracted: Dims, *, precision: Any, dtype: Any, batch: int = 0
) -> jax.Array:
    """Contracts axes of `x` with axes of `w`.

    Arguments:
        x, w: the operands.
        contracted: the axes that are contracted, of both operands.
        precision: as in `jax.lax.dot_general`.
        dtype: of the result.
        batch: how many leading axes the operands share.

    Returns:
        an array with the axes of the batch, the free axes of `x`, and those of `w`.
    """
    product = rank_matmul_p.bind if _compat.is_for_cpu(x, w) else _plain
    return product(x, w, contracted=contracted, batch=batch, precision=precision, dtype=dtype)


def _plain(x: jax.Array, w: jax.Array, *, contracted: Dims, batch: int, precision: Any, dtype: Any) -> jax.Array:
    dims = contracted, (tuple(range(batch)), tuple(range(batch)))
    return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=dtype)


def _flattened(x: jax.Array, w: jax.Array, *, contracted: Dims, batch: int, **options: Any) -> jax.Array:
    """The same with one free and one contracted axis for each operand, if these are contiguous."""
    if not all(_at_one_end(a.ndim, c, batch) for a, c in zip((x, w), contracted, strict=True)):
        return _plain(x, w, contracted=contracted, batch=batch, **options)
    shape = _result_shape(x, w, contracted, batch)
    x, w = (_with_two_axes(a, c, batch) for a, c in zip((x, w), contracted, strict=True))
    inner: Any = tuple((batch + (c[0] != batch),) for c in contracted)
    if inner == ((batch,), (batch,)) and _is_taller(x.shape[-1], w.shape[-1], x.shape[batch]):
        # The gradient of a factor onto the rank. XLA's product of a tall, thin result takes four times as long as that
        # of the transposed one, and without the barrier it turns the latter into the former.
        y = _plain(w, x, contracted=inner, batch=batch, **options)
        # XLA's CPU backend aborts (jaxlib 0.10.2) if the transposition of a small batched product becomes its layout.
        y = _compat.call_apart(_turned, y) if batch else lax.optimization_barrier(y).swapaxes(-1, -2)
    else:
        y = _plain(x, w, contracted=inner, batch=batch, **options)
    return y.reshape(shape)


@jax.jit
def _turned(y: jax.Array) -> jax.Array:
    return y.swapaxes(-1, -2)


def _with_two_axes(a: jax.Array, contracted: tuple[int, ...], batch: int) -> jax.Array:
    """An operand with one contracted and one free axis after those of the batch."""
    size = math.prod(a.shape[k] for k in contracted)
    rows = math.prod(n for k, n in enumerate(a.shape) if k >= batch and k not in contracted)
    shape = (*a.shape[:batch], size, rows) if contracted[0] == batch else (*a.shape[:batch], rows, size)
    return _compat.reshape_apart(a, shape) if batch and all(map(is_static, shape)) else a.reshape(shape)


def _result_shape(x: Any, w: Any, contracted: Dims, batch: int) -> tuple[Any, ...]:
    operands = zip((x, w), contracted, strict=True)
    free = (n for a, c in operands for k, n in enumerate(a.shape) if k >= batch and k not in c)
    return (*x.shape[:batch], *free)


def _is_taller(rows: int, columns: int, contracted: int) -> bool:
    """Whether a product is that of a tall result, and long enough to make up for reading its transposition.

    The optimiser reads a transposed gradient slowly: 1.5 times the time of both if as much is contracted as there are
    columns, and as long as without if it is twice as much. Symbolic sizes are not tall.
    """
    static = is_static(rows) and is_static(columns) and is_static(contracted)
    return static and rows > columns and contracted > 2 * columns


def _at_one_end(ndim: int, axes: tuple[int, ...], batch: int) -> bool:
    """Whether axes are the first after the batch, or the last of an array, in order."""
    count = len(axes)
    return bool(axes) and axes in (tuple(range(batch, batch + count)), tuple(range(ndim - count, ndim)))


def _transpose_x(g: jax.Array, x: Any, w: jax.Array, *, contracted: Dims, batch: int, **options: Any) -> jax.Array:
    xc, wc = contracted
    shape = x.aval.shape
    w_free = tuple(k for k in range(batch, w.ndim) if k not in wc)
    g_free = tuple(range(g.ndim - len(w_free), g.ndim))
    y = rank_matmul(g, w, (g_free, w_free), batch=batch, **options | {"dtype": x.aval.dtype})
    # The axes of y: the others of x, then the contracted ones in the order of w.
    order = [k for k in range(len(shape)) if k not in xc] + [xc[wc.index(k)] for k in sorted(wc)]
    return _arrange(y, order)


def _transpose_w(g: jax.Array, x: jax.Array, w: Any, *, contracted: Dims, batch: int, **options: Any) -> jax.Array:
    xc, wc = contracted
    shape = w.aval.shape
    x_free = tuple(k for k in range(batch, x.ndim) if k not in xc)
    g_free = tuple(range(batch, batch + len(x_free)))
    y = rank_matmul(x, g, (x_free, g_free), batch=batch, **options | {"dtype": w.aval.dtype})
    # The axes of y: those of the batch, the contracted ones in the order of x, then the free ones of w.
    order = [*range(batch), *(wc[xc.index(k)] for k in sorted(xc))]
    return _arrange(y, order + [k for k in range(batch, len(shape)) if k not in wc])


def _arrange(y: jax.Array, order: list[int]) -> jax.Array:
    """Puts axis k of `y` at `order[k]`."""
    return y if order == sorted(order) else y.transpose([order.index(k) for k in range(len(order))])


def _batched(args: Any, axes: Any, *, contracted: Dims, batch: int, **options: Any) -> tuple[jax.Array, int]:
    """The mapped axis is one of the batch if both operands have it, and a free axis if one has it."""
    both = None not in axes
    place = 0 if both else batch
    x, w = (a if axis is None else jnp.moveaxis(a, axis, place) for a, axis in zip(args, axes, strict=True))
    shifted: Any = tuple(
        c if axis is None else tuple(k + 1 for k in c) for c, axis in zip(contracted, axes, strict=True)
    )
    y = rank_matmul(x, w, shifted, batch=batch + both, **options)
    return y, place if axes[0] is not None else args[0].ndim - len(contracted[0])


def _abstract(x: Any, w: Any, *, contracted: Dims, batch: int, precision: Any, dtype: Any) -> Any:
    return jax.typeof(jax.ShapeDtypeStruct(_result_shape(x, w, contracted, batch), dtype))


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
rank_matmul_p.def_impl(eager(rank_matmul_p, _plain, ("contracted", "batch", "precision", "dtype")))
rank_matmul_p.def_abstract_eval(_abstract)
ad.defbilinear(rank_matmul_p, _transpose_x, _transpose_w)
batching.primitive_batchers[rank_matmul_p] = _batched
mlir.register_lowering(rank_matmul_p, mlir.lower_fun(_plain, multiple_results=False))
mlir.register_lowering(rank_matmul_p, _lowered, platform="cpu")
