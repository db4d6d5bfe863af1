"""LoRA as it is written into a model by hand: what a transformation has to be as good as."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import jlora


class Weight(NamedTuple):
    """A frozen kernel `(in, out)`, maybe quantised, with its factors `(in, rank)` and `(rank, out)`, maybe stacked."""

    w: Any
    a: jax.Array
    b: jax.Array


# path -> (a, b)
Factors = Mapping[str, tuple[jax.Array, jax.Array]]


def attach(params: Any, factors: Factors) -> Any:
    """The parameters with a `Weight` wherever there are factors for the path."""

    def leaf(path: Any, w: jax.Array) -> Any:
        found = factors.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        return w if found is None else Weight(w, *found)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda node: isinstance(node, jlora.Quantized))


def usual(scale: float) -> Callable[[jax.Array, Any], jax.Array]:
    """The product as nearly every model has it, on activations `(batch, length, in)`; one without factors stays."""

    def product(x: jax.Array, weight: Any) -> jax.Array:
        if not isinstance(weight, Weight):
            return _frozen(x, weight)
        return _frozen(x, weight.w) + scale * ((x @ weight.a.astype(x.dtype)) @ weight.b.astype(x.dtype))

    return product


def flattened(scale: float) -> Callable[[jax.Array, Weight], jax.Array]:
    """The same with the leading axes of the low-rank products made one.

    The gradient of `b` then contracts one axis. With two, XLA for the CPU first makes a transposed copy of the
    wide cotangent, which takes longer than the product.
    """

    def product(x: jax.Array, weight: Weight) -> jax.Array:
        low = (x.reshape(-1, x.shape[-1]) @ weight.a) @ weight.b
        return x @ weight.w + scale * low.reshape(*x.shape[:-1], -1)

    return product


def _frozen(x: jax.Array, w: Any) -> jax.Array:
    """`x @ w`. For the gradient a quantised kernel keeps its codes and not its floats."""
    if not isinstance(w, jlora.Quantized):
        return x @ w
    return jax.checkpoint(lambda x, w: x @ w.dequantize())(x, w)
