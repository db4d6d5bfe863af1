"""LoftQ: a quantised base and a LoRA that start together near the weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._ir.materialize import accumulation_dtype, delta
from jlora._tree.leaves import as_array, is_quantized, requantize
from jlora._tree.paths import flatten, named_leaves
from jlora.methods import LoRA
from jlora.methods._base import Adapter, Update
from jlora.methods._common.initializers import named_start
from jlora.methods._common.matrices import as_matrix
from jlora.methods._lowering import check_fits, lower_updates


def loftq(adapter: Adapter, params: Any, quantized: Any, *, steps: int = 5) -> tuple[Any, Adapter]:
    """Starts LoRA with what quantisation took away, so that base and update together are near the weight.

        repeat:  Q = round(W - s A B);  A, B = leading singular vectors of (W - Q) / s          W ~ Q + s A B

    Where A B starts at zero the model starts from the rounded weights; here it starts nearer to the whole ones. It is
    not the quantised base that the adapted program then equals at the start.

    Arguments:
        adapter: from `jlora.init`, of LoRA; what its factors hold is replaced.
        params: the base parameters before they were quantised.
        quantized: the same quantised (`jlora.quantize`); the weights that the adapter does not have stay as they are.
        steps: how often the two take turns.

    Returns:
        the quantised parameters and the adapter, which belong together: save both.

    Raises:
        ValueError: where the adapter does not fit, its method is no plain LoRA, or its weight is not quantised.

    Li et al. 2023, arXiv:2310.08659.
    """
    if steps < 1:
        raise ValueError(f"LoftQ takes at least one step, not {steps}.")
    weights, leaves = dict(named_leaves(params)), dict(named_leaves(quantized))
    check_fits([adapter], weights)
    check_fits([adapter], leaves)
    found, out = dict(leaves), {}
    for path, update in adapter.items():
        method = update.method
        if not isinstance(method, LoRA) or method.offset or update.scale != 1:
            raise ValueError(f"{path}: LoftQ initialises LoRA without offset or jlora.scale, not {method}.")
        if not is_quantized(leaves[path]):
            raise ValueError(f"{path} is not quantised: give it a form in jlora.quantize, or leave it out here.")
        found[path], out[path] = _turns(update, weights[path], leaves[path], steps)
    return jax.tree.unflatten(flatten(quantized)[1], list(found.values())), out


def _turns(update: Update, weight: jax.Array, leaf: Any, steps: int) -> tuple[Any, Update]:
    @jax.jit
    def run(weight: jax.Array, leaf: Any) -> tuple[Any, Update]:
        wide, last = weight.astype(accumulation_dtype(weight.dtype)), update
        for step in range(steps):
            if step:
                leaf = requantize(leaf, wide - delta(lower_updates([{"": last}], wide, ""), wide.dtype))
            last = _fitted(update, wide - as_array(leaf).astype(wide.dtype))
        return leaf, last

    return run(weight, leaf)


def _fitted(update: Update, difference: jax.Array) -> Update:
    """The update nearest to a difference of the weight's shape."""
    method: Any = update.method
    matrix = as_matrix(difference, update.roles)
    a, b = named_start("pissa", jax.random.key(0), matrix, matrix.shape, method.rank)
    root = jnp.sqrt(jnp.asarray(method.scale, a.dtype))
    found = {"a": a / root, "b": b / root}

    def group(arrays: dict[str, Any]) -> dict[str, Any]:
        return {
            name: found[name].reshape(array.shape).astype(array.dtype) if name in found else array
            for name, array in arrays.items()
        }

    return dataclasses.replace(update, key=None, factors=group(update.factors), frozen=group(update.frozen))
