"""The law on random numbers: how many examples are drawn, and how far the two sides may differ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings

import jlora
from tests.support.agreement import F32, adapter_for, check_law, random

_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
FIXED = settings(deadline=None, derandomize=True, database=None, max_examples=20, suppress_health_check=_HEALTH)
CHAINS = settings(FIXED, max_examples=25)
FRESH = settings(FIXED, derandomize=False, max_examples=1500, print_blob=True)
DTYPES = ("float32", "float32", "bfloat16", "float16")


def tolerance(*dtypes: Any) -> float:
    """What the two sides may differ by, relative to the largest entry.

    In float32 it is the law's own bound. In a narrow dtype, five numbers are rounded, each by half an epsilon at most:
    the product onto the rank, the product from it and the sum; the merged weight and its product. No sum cancels,
    because in these dtypes all numbers are positive.
    """
    return max(F32, *(2.5 * float(jnp.finfo(dtype).eps) for dtype in dtypes))


def law(f: Any, params: dict[str, Any], targets: Any, seed: int, *args: Any, bound: float, factored: bool) -> None:
    """Adapts what `targets` names, and checks the law on random numbers; with `factored`, nothing may be materialised.

    Shapes among `params` and `args` stand for arrays of random numbers. They have no signs where sums might cancel by
    so much that rounding alone would exceed the bound: in narrow dtypes, and where a tree has a handful of entries.
    """
    few = any(leaf.size < 8 for leaf in jax.tree.leaves((params["w"], jax.eval_shape(f, params, *args))))
    rng, positive = np.random.default_rng(seed), few or bound > F32

    def filled(leaf: Any) -> jax.Array:
        return leaf if isinstance(leaf, jax.Array) else random(rng, leaf.shape, leaf.dtype, positive=positive)

    params, args = jax.tree.map(filled, (params, args))
    adapter = adapter_for(jlora.trace(f, params, *args), targets, rng, positive=positive)
    if factored:
        assert jlora.explain(f, params, adapter, *args).dense == ()
    check_law(f, params, adapter, *args, bound=bound, on_dense="error" if factored else "allow")
