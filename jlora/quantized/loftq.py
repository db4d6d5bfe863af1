"""LoftQ: a quantised base and a LoRA that are initialised together, so that their sum is near the weight."""

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
    """Initialises LoRA with the error of quantisation, so that base and update together are near the weight.

        repeat:  Q = round(W - s A B);  A, B = leading singular vectors of (W - Q) / s          W ~ Q + s A B

    With A B = 0 the model starts from the rounded weights; here it starts nearer to the weights before rounding. So at
    initialisation the adapted program does not equal the quantised base.

    Arguments:
        adapter: from `jlora.init`, of LoRA; its factors are replaced.
        params: the base parameters before they were quantised.
        quantized: the same parameters quantised (`jlora.quantize`). Weights without an update are not changed.
        steps: the number of repetitions.

    Returns:
        the quantised parameters and the adapter. They belong together: save both.

    Raises:
        ValueError: if the adapter does not fit, its method is not LoRA, or an adapted weight is not quantised.

    Example:
        base = jlora.quantize(params, sites, {".*/kernel": "nf4"})
        adapter = jlora.init(key, sites, {".*/kernel": jlora.LoRA(rank=16)})
        base, adapter = jlora.loftq(adapter, params, base)

    Li et al. 2023, arXiv:2310.08659.
    """
    if steps < 1:
        raise ValueError(f"LoftQ takes at least one step, not {steps}.")
    weights, leaves = dict(named_leaves(params)), dict(named_leaves(quantized))
    check_fits([adapter], weights)
    check_fits([adapter], leaves)
    initialised = {}
    for path, update in adapter.items():
        method = update.method
        if not isinstance(method, LoRA) or method.offset or update.scale != 1:
            raise ValueError(f"{path}: LoftQ initialises LoRA without offset or jlora.scale, not {method}.")
        if not is_quantized(leaves[path]):
            raise ValueError(f"{path} is not quantised: give it a format in jlora.quantize, or leave it out here.")
        leaves[path], initialised[path] = _alternate(update, weights[path], leaves[path], steps)
    return jax.tree.unflatten(flatten(quantized)[1], list(leaves.values())), initialised


def _alternate(update: Update, weight: jax.Array, leaf: Any, steps: int) -> tuple[Any, Update]:
    """Quantises the rest of the weight and fits the update to the error, `steps` times."""

    @jax.jit
    def run(weight: jax.Array, leaf: Any) -> tuple[Any, Update]:
        wide, fitted = weight.astype(accumulation_dtype(weight.dtype)), update
        for step in range(steps):
            if step:
                leaf = requantize(leaf, wide - delta(lower_updates([{"": fitted}], wide, ""), wide.dtype))
            fitted = _fit(update, wide - as_array(leaf).astype(wide.dtype))
        return leaf, fitted

    return run(weight, leaf)


def _fit(update: Update, difference: jax.Array) -> Update:
    """The update nearest to a difference of the weight's shape."""
    method: Any = update.method
    matrix = as_matrix(update.at_layers(difference), update.roles)
    a, b = named_start("pissa", jax.random.key(0), matrix, matrix.shape, method.rank)
    root = jnp.sqrt(jnp.asarray(method.scale, a.dtype))
    fitted = {"a": a / root, "b": b / root}

    def replace(arrays: dict[str, Any]) -> dict[str, Any]:
        return {
            name: fitted[name].reshape(array.shape).astype(array.dtype) if name in fitted else array
            for name, array in arrays.items()
        }

    return dataclasses.replace(update, key=None, factors=replace(update.factors), frozen=replace(update.frozen))
