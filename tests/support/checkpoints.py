"""Adapters, and the comparison of what was saved with what came back, for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from tests.support import toy_model

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"


def varied() -> dict:
    """The adapter in `golden/checkpoints`: a scale, frozen arrays, a stack, two dtypes. Its numbers never change."""
    targets = {
        "embed": jlora.LoRA(rank=2, alpha=3.0, rank_stabilized=True, freeze_a=True),
        "layers/up": jlora.DoRA(rank=1, dropout=0.25),
        "layers/down": jlora.Hadamard(2, 2, alpha=4.0),
        "mix/kernel": jlora.LoRA(rank=2, start="gaussian", offset=True),
        "mix/bias": jlora.Full(),
    }
    made = jax.eval_shape(lambda: jlora.init(jax.random.key(0), toy_model.sites(), targets))
    adapter = toy_model.nonzero(made)
    bias = jax.tree.map(lambda a: a.astype(jnp.bfloat16), adapter["mix/bias"])
    return {**adapter, **jlora.scale({"mix/kernel": adapter["mix/kernel"]}, 0.5), "mix/bias": bias}


def same(a: Any, b: Any) -> None:
    """Raises unless two trees are equal to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if not hasattr(x, "dtype"):
            assert (type(x), x) == (type(y), y)
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
