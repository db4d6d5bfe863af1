"""A term of a sum, or a reshaped activation, kept apart from what computes it.

If the last term of a sum is reshaped or broadcast, XLA's CPU backend fuses the sum into each of its consumers, and so
keeps all terms in memory until the last of them, in the backward pass. With a barrier around that term it keeps the
sum. So in programs for the CPU this is a primitive that is lowered to a barrier, and so is the term's cotangent. In all
other programs no primitive is bound; one that was traced on a CPU host has no barrier on another platform either.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ir.sizes import is_static


def apart(x: jax.Array) -> jax.Array:
    """The array itself, behind a barrier in compiled programs for the CPU."""
    return apart_p.bind(x) if _compat.is_tracer(x) and _compat.is_for_cpu(x) else x


def _same(x: Any) -> Any:
    return x


apart_p = Primitive("jlora_apart")
apart_p.def_impl(_same)
apart_p.def_abstract_eval(_same)
ad.deflinear2(apart_p, lambda cotangent, _: [apart(cotangent)])
batching.defvectorized(apart_p)
mlir.register_lowering(apart_p, mlir.lower_fun(_same, multiple_results=False))
mlir.register_lowering(apart_p, mlir.lower_fun(lax.optimization_barrier, multiple_results=False), platform="cpu")


def reshape_apart(x: jax.Array, shape: Sequence[Any]) -> jax.Array:
    """`x.reshape(shape)`. In compiled programs for one CPU what computes `x`, or its cotangent, is computed once.

    XLA's CPU backend otherwise computes an activation that is read in two shapes once for each of them.
    """
    is_plain = x.shape == tuple(shape) or not all(map(is_static, (*x.shape, *shape)))
    if is_plain or not (_compat.is_tracer(x) and _compat.is_for_cpu(x)):
        return x.reshape(shape)
    return reshape_p.bind(x, shape=tuple(shape))


def _reshape(x: Any, *, shape: tuple[int, ...]) -> Any:
    return x.reshape(shape)


def _lower_reshape(ctx: Any, x: Any, *, shape: tuple[int, ...]) -> Any:
    fun = _compat.reshape_apart if _compat.is_single_device(ctx) else jnp.reshape
    return mlir.lower_fun(lambda x: fun(x, shape), multiple_results=False)(ctx, x)


def _batch_reshape(operands: Any, axes: Any, *, shape: tuple[int, ...]) -> tuple[jax.Array, int]:
    (x,), (axis,) = operands, axes
    return reshape_apart(jnp.moveaxis(x, axis, 0), (x.shape[axis], *shape)), 0


reshape_p = Primitive("jlora_reshape")
reshape_p.def_impl(_reshape)
reshape_p.def_abstract_eval(lambda x, *, shape: x.update(shape=shape))
ad.deflinear2(reshape_p, lambda cotangent, x, *, shape: [reshape_apart(cotangent, x.aval.shape)])
batching.primitive_batchers[reshape_p] = _batch_reshape
mlir.register_lowering(reshape_p, mlir.lower_fun(_reshape, multiple_results=False))
mlir.register_lowering(reshape_p, _lower_reshape, platform="cpu")


def one_way_barrier(x: jax.Array, *, of_cotangent: bool) -> jax.Array:
    """The array itself, behind a barrier either where it is computed or where its cotangent is.

    `jax.lax.optimization_barrier` is in both places. Then a product whose result, or whose cotangent, is added to that
    of another product is not added in the kernel of the product.
    """
    return _before_cotangent(x) if of_cotangent else _before_value(x)


@jax.custom_jvp
def _before_value(x: Any) -> Any:
    return lax.optimization_barrier(x)


@jax.custom_jvp
def _before_cotangent(x: Any) -> Any:
    return x


_before_value.defjvp(lambda primals, tangents: (_before_value(*primals), *tangents))
_before_cotangent.defjvp(lambda primals, tangents: (_before_cotangent(*primals), lax.optimization_barrier(*tangents)))
