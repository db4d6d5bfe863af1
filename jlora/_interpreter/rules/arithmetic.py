"""Sums of weights, and weights times a scalar or a vector: `add`, `sub`, `mul`, `div`, `neg`."""

import dataclasses

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._compat import Eqn
from jlora._interpreter.context import Context, Value
from jlora._interpreter.rules.joining import can_join, join
from jlora._interpreter.rules.registry import register_rule
from jlora._ir import lazy
from jlora._ir.algebra import merge_indices
from jlora._ir.materialize import dense, without_maps_along
from jlora._ir.sizes import is_wide
from jlora._ir.weight import AdaptedWeight, TensorNetwork


@register_rule("add", "sub")
def add(ctx: Context, eqn: Eqn, left: Value, right: Value) -> list[Value] | None:
    """The sum of two weights has the networks of both. An array without an update is added to the base."""
    if not (isinstance(left, AdaptedWeight) and isinstance(right, AdaptedWeight)):
        return _add_to_base(ctx, eqn, left, right)
    if left.shape != right.shape or any(f.gathered_axes or f.maps for f in (left, right)):
        return None
    left, right = merge_indices(left), merge_indices(right)
    if not can_join(left, right):
        return None
    (base,) = lazy.bind(eqn, left.base, right.base)
    return [join([left, _scale_networks(right, -1.0) if eqn.primitive.name == "sub" else right], base)]


def _add_to_base(ctx: Context, eqn: Eqn, left: Value, right: Value) -> list[Value] | None:
    f = left if isinstance(left, AdaptedWeight) else right
    if not f.is_matrix or f.gathered_axes or f.maps or _compat.aval(eqn.outvars[0]).shape != f.shape:
        return None
    if f.multiplied is not None:  # it may be an activation
        return None
    if ctx.trace_only:  # the sum may be an activation, but this use would not materialise an update
        ctx.record(eqn, f, {})
        return list(_compat.bind(eqn, *(dense(v) if v is f else v for v in (left, right))))
    if f.is_dense:  # materialising it costs nothing
        return None
    (base,) = lazy.bind(eqn, *(v.base if v is f else v for v in (left, right)))
    subtracted = eqn.primitive.name == "sub" and f is right
    return [dataclasses.replace(_scale_networks(f, -1.0) if subtracted else f, base=base)]


@register_rule("mul", "div")
def mul(ctx: Context, eqn: Eqn, left: Value, right: Value) -> list[Value] | None:
    """Multiplies the base, and each network by one more factor: a scalar, or a vector along some axes."""
    f = max((v for v in (left, right) if isinstance(v, AdaptedWeight)), key=lambda v: len(_wide_axes(v)))
    factor = right if f is left else left
    if isinstance(factor, AdaptedWeight):
        factor = _dense_factor(ctx, eqn, f, factor)
    divides = eqn.primitive.name == "div"
    if factor is None or (divides and f is right) or not _can_multiply(eqn, f, factor):
        return None
    (base,) = lazy.bind(eqn, *((f.base, factor) if f is left else (factor, f.base)))
    f = merge_indices(without_maps_along(f, [k for k, n in enumerate(jnp.shape(factor)) if is_wide(n)]))
    term = "".join(axis for axis, n in zip(f.axes, jnp.shape(factor), strict=False) if is_wide(n))
    vector = jnp.asarray(factor).reshape([f.size(c) for c in term])
    networks = tuple(_multiply_network(n, vector, term, divides) for n in f.networks)
    return [dataclasses.replace(f, base=base, networks=networks)]


def _can_multiply(eqn: Eqn, f: AdaptedWeight, factor: jax.Array) -> bool:
    """Whether the factor is a floating-point scalar, or a vector along some axes of a matrix that is still a weight."""
    factor_type = jax.typeof(factor)
    if not f.is_matrix or _compat.aval(eqn.outvars[0]).shape != f.shape:
        return False
    if not jnp.issubdtype(factor_type.dtype, jnp.floating):
        return False
    num_axes = sum(map(is_wide, factor_type.shape))
    return num_axes == 0 or not (f.gathered_axes or num_axes == len(_wide_axes(f)))


def _multiply_network(n: TensorNetwork, vector: jax.Array, term: str, divides: bool) -> TensorNetwork:
    factor = vector.astype(n.factors[0].dtype)
    factor = 1 / factor if divides else factor
    if not term:  # a scalar multiplies the first factor, without a product of its own
        return dataclasses.replace(n, factors=(n.factors[0] * factor, *n.factors[1:]))
    return dataclasses.replace(n, factors=(*n.factors, factor), terms=(*n.terms, term))


def _wide_axes(f: AdaptedWeight) -> list[int]:
    return [k for k, n in enumerate(f.shape) if is_wide(n)]


def _dense_factor(ctx: Context, eqn: Eqn, f: AdaptedWeight, factor: AdaptedWeight) -> jax.Array | None:
    """The value of a factor that is an adapted parameter itself: dense at no cost. None for a second matrix."""
    if len(_wide_axes(factor)) >= len(_wide_axes(f)) or not factor.is_dense:
        return None
    ctx.record(eqn, factor, {}, factored=False, added=factor.base.size if factor.networks else 0)
    return dense(factor)


@register_rule("neg")
def neg(ctx: Context, eqn: Eqn, f: AdaptedWeight) -> list[Value]:
    """Negates the base and the networks."""
    return [dataclasses.replace(_scale_networks(f, -1.0), base=lazy.bind(eqn, f.base)[0])]


def _scale_networks(f: AdaptedWeight, factor: float) -> AdaptedWeight:
    return dataclasses.replace(f, networks=tuple(dataclasses.replace(n, scale=n.scale * factor) for n in f.networks))
