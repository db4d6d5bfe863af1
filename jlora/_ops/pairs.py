"""Maps of pairs of entries, such as rotations: two elementwise products, with the pair and with the pair reversed.

    y = x * straight + reverse(x) * crossed

The backward pass needs x and g, the cotangent of y. In programs for the CPU it is two calls that XLA does not inline:
else it stores the cotangent of x before it has used x, and keeps four activations in the place of three.

    gx = g * straight + reverse(g * crossed),    gradients: sum of g * x, and of g * reverse(x)
"""

import functools
from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ops.matmul import eager


def map_pairs(x: jax.Array, straight: jax.Array, crossed: jax.Array, axis: int) -> jax.Array:
    """The sum of both products.

    Arguments:
        x: the activation.
        straight, crossed: the multipliers, with as many axes as x, some of them of size one.
        axis: of the pairs.
    """
    operands = x, straight, crossed
    return _mapped(axis, *operands) if _compat.is_for_cpu(*operands) else _plain(*operands, axis=axis)


def _plain(x: jax.Array, straight: jax.Array, crossed: jax.Array, *, axis: int) -> jax.Array:
    return x * straight + lax.rev(x, (axis,)) * crossed


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mapped(axis: int, *operands: jax.Array) -> jax.Array:
    return _plain(*operands, axis=axis)


@_mapped.defjvp
def _jvp(axis: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _mapped(axis, *primals), pairs_tangent_p.bind(*primals, *tangents, axis=axis)


def _tangent(*operands: Any, axis: int) -> jax.Array:
    return jax.jvp(functools.partial(_plain, axis=axis), operands[:3], operands[3:])[1]


def _transpose(g: Any, x: Any, straight: Any, crossed: Any, *linear: Any, axis: int) -> list[Any]:
    if isinstance(g, ad.Zero):
        return [None] * 6
    of_multipliers = _compat.call_apart(_gradients_of_multipliers, axis, g, x, straight, crossed)
    # This call passes the others on, so that it comes after them: x and its reverse are free then.
    cotangents = _compat.call_apart(_gradient_of_x, axis, g, straight, crossed, *of_multipliers)
    results = zip(linear, cotangents, strict=True)
    return [None, None, None, *(value if ad.is_undefined_primal(operand) else None for operand, value in results)]


@functools.partial(jax.jit, static_argnums=0)
def _gradients_of_multipliers(axis: int, g: Any, x: Any, straight: Any, crossed: Any) -> tuple[jax.Array, ...]:
    return jax.vjp(functools.partial(_plain, x, axis=axis), straight, crossed)[1](g)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_of_x(axis: int, g: Any, straight: Any, crossed: Any, *others: Any) -> tuple[jax.Array, ...]:
    return g * straight + lax.rev(g * crossed, (axis,)), *others


def _tangent_jvp(primals: Any, tangents: Any, *, axis: int) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(functools.partial(_tangent, axis=axis), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _batched(operands: Any, axes: Any, *, axis: int) -> tuple[jax.Array, int]:
    return jax.vmap(functools.partial(_tangent, axis=axis), in_axes=axes)(*operands), 0


pairs_tangent_p = Primitive("jlora_pairs_tangent")
pairs_tangent_p.def_impl(eager(pairs_tangent_p, _tangent, ("axis",)))
pairs_tangent_p.def_abstract_eval(lambda x, *_, axis: x)
ad.primitive_jvps[pairs_tangent_p] = _tangent_jvp
ad.primitive_transposes[pairs_tangent_p] = _transpose
batching.primitive_batchers[pairs_tangent_p] = _batched
mlir.register_lowering(pairs_tangent_p, mlir.lower_fun(_tangent, multiple_results=False))
