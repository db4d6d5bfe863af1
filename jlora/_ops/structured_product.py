"""Products with structured updates: beside the base, or merged into it with a gradient that does not need x^T g."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._ir.algebra import align_axes
from jlora._ir.materialize import accumulation_dtype
from jlora._ir.structured import StructuredNetwork

Product = Callable[[Any, Any], jax.Array]  # of an activation and a weight


def apply_structure(
    x: jax.Array,
    labels: str,
    network: StructuredNetwork,
    out: str,
    *,
    weight: str,
    sizes: Mapping[str, int],
    dtype: jnp.dtype,
    precision: Any,
) -> jax.Array:
    """`scale * x M(theta)`, without M.

    Arguments:
        x: the activation.
        labels: one index for every axis of `x`; those that are not in `out` are the inputs of the network.
        network: the network.
        out: the indices of the result, in order.
        weight: the indices of the weight. The others of theta are its own.
        sizes: of the indices of x and of the weight.
        dtype: of the result.
        precision: of the program's product.
    """
    assert network.structure is not None
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else dtype
    stack = "".join(c for c in out if c in weight and any(c in term for term in network.terms))
    of_x = "".join(c for c in stack if c in labels)
    rows = "".join(c for c in labels if c not in stack + network.inputs)
    x = align_axes(x.astype(compute), labels, of_x + rows + network.inputs)
    n_in = _size(network.inputs, sizes)
    x = x.reshape(*(sizes[c] for c in of_x), _size(rows, sizes), n_in)
    with _default_precision(precision):
        parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)  # structures are real, and know real activations
        ys = [network.per_layer(network.structure.apply, stack, (part, of_x)) for part in parts]
    y = lax.complex(*ys) if len(ys) == 2 else ys[0]
    y = y * jnp.asarray(network.scale, y.dtype)
    reached = stack + rows + network.outputs
    return align_axes(y.astype(dtype).reshape([sizes[c] for c in reached]), reached, out)


def _default_precision(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Gives products without a precision that of an equation: the higher of two, and the highest for an algorithm."""
    if precision is None:
        return contextlib.nullcontext()
    given = precision if isinstance(precision, tuple) else (precision,)
    levels = [level if isinstance(level, lax.Precision) else lax.Precision.HIGHEST for level in given]
    return jax.default_matmul_precision(max(levels, key=lambda level: level.value).name.lower())


def _size(names: str, sizes: Mapping[str, int]) -> int:
    return functools.reduce(lambda size, name: size * sizes[name], names, 1)


def merged_weight(
    base: jax.Array, networks: Sequence[StructuredNetwork], *, labels: str, sizes: Mapping[str, int]
) -> jax.Array:
    """The base plus the matrix of every network: the sum in float32 or wider, rounded once.

    Arguments:
        base: the base of the weight.
        networks: the networks.
        labels: the indices of the weight, in order.
        sizes: of all indices.
    """
    dtype = accumulation_dtype(base.dtype)
    total = base.astype(dtype)
    for n in networks:
        (value,), (term,) = (matrix := n.matrix(labels, sizes)).factors, matrix.terms
        value = align_axes(value.astype(dtype), term, labels) * jnp.asarray(n.scale, dtype)
        total = total + value.reshape(base.shape)
    return total.astype(base.dtype)


def merged_product(
    x: jax.Array,
    base: jax.Array,
    networks: Sequence[StructuredNetwork],
    *,
    product: Product,
    merge: Callable[[jax.Array, Sequence[StructuredNetwork]], jax.Array],
    branch: Callable[[jax.Array, StructuredNetwork], jax.Array],
) -> jax.Array:
    """`product(x, merge(base, networks))`, whose derivative in the networks is the sum of `branch(x, network)`.

    So the gradient of a network's theta is the transpose of its branch, and none of the whole weight is computed. The
    branch itself is computed by forward-mode differentiation alone.

    Arguments:
        x, base: the activation and the base of the weight.
        networks: what is added to the base.
        product: the program's own product of an activation and a weight, linear in both.
        merge: the sum of base and networks, affine in the networks.
        branch: the product of the activation and one network, linear in its theta.
    """
    forms = [dataclasses.replace(n, factors=()) for n in networks]  # the rule of the derivative outlives the arrays

    def with_thetas(thetas: Any) -> list[StructuredNetwork]:
        return [dataclasses.replace(n, factors=theta) for n, theta in zip(forms, thetas, strict=True)]

    @jax.custom_jvp
    def run(x: Any, base: Any, thetas: Any) -> jax.Array:
        return product(x, merge(base, with_thetas(thetas)))

    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (x, base, thetas), (dx, dbase, dthetas) = primals, tangents
        y = run(x, base, thetas)
        terms = [] if _is_zero(dx) else [product(dx, merge(base, with_thetas(thetas)))]
        terms += [] if _is_zero(dbase) else [product(x, dbase)]
        for n, (_, *constants), (dtheta, *_) in zip(forms, thetas, dthetas, strict=True):
            if not _is_zero(dtheta):
                # Under `jax.checkpoint` the forward pass computes nothing of the branch, and keeps x alone.
                tangent = jax.checkpoint(branch, prevent_cse=False)
                terms.append(tangent(x, dataclasses.replace(n, factors=(dtheta, *constants))))
        return y, functools.reduce(jnp.add, terms, jnp.zeros_like(y)) if len(terms) != 1 else terms[0]

    run.defjvp(derivative, symbolic_zeros=True)
    return run(x, base, [n.factors for n in networks])


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
