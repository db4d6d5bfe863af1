"""LoRA written by hand into a model: the reference for the cost of the transformation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import jlora


class Weight(NamedTuple):
    """A frozen kernel `(in, out)`, dense or quantised, with `(in, rank)` and `(rank, out)`, or stacks of them."""

    w: Any
    a: jax.Array
    b: jax.Array


# path -> (a, b)
Factors = Mapping[str, tuple[jax.Array, jax.Array]]


def attach(params: Any, factors: Factors) -> Any:
    """The parameters with a `Weight` in place of every kernel whose path has factors."""

    def replace(keypath: Any, w: jax.Array) -> Any:
        path = jax.tree_util.keystr(keypath, simple=True, separator="/")
        return Weight(w, *factors[path]) if path in factors else w

    return jax.tree_util.tree_map_with_path(replace, params, is_leaf=lambda node: isinstance(node, jlora.Quantized))


def standard(scale: float) -> Callable[[jax.Array, Any], jax.Array]:
    """The matmul as most models write it, on activations `(batch, length, in)`; weights without factors are frozen."""

    def product(x: jax.Array, weight: Any) -> jax.Array:
        if not isinstance(weight, Weight):
            return _frozen(x, weight)
        return _frozen(x, weight.w) + scale * ((x @ weight.a.astype(x.dtype)) @ weight.b.astype(x.dtype))

    return product


def flattened(scale: float) -> Callable[[jax.Array, Weight], jax.Array]:
    """The same with the leading axes of the low-rank products flattened into one.

    The gradient of `b` then contracts one axis. With two, XLA for the CPU first writes a transposed copy of the wide
    cotangent, which takes longer than the product.
    """

    def product(x: jax.Array, weight: Weight) -> jax.Array:
        low_rank = (x.reshape(-1, x.shape[-1]) @ weight.a) @ weight.b
        return x @ weight.w + scale * low_rank.reshape(*x.shape[:-1], -1)

    return product


def _frozen(x: jax.Array, w: Any) -> jax.Array:
    """`x @ w`. A quantised kernel is dequantised again in the backward pass, so that only its codes are saved."""
    if not isinstance(w, jlora.Quantized):
        return x @ w
    return jax.checkpoint(lambda x, w: x @ w.dequantize())(x, w)
