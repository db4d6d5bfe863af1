"""Where the arrays of a checkpoint go."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

HOST = "host"
"""The placement of a NumPy array."""

Placement: TypeAlias = jax.sharding.Sharding | Literal["host"] | None
"""A sharding, `HOST`, or None: the default device, with the array not committed to it."""


def placement_of(leaf: Any) -> Placement:
    """Returns the placement of an array of a tree; uncommitted arrays stay uncommitted."""
    if isinstance(leaf, np.ndarray | np.generic):
        return HOST
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or (isinstance(leaf, jax.Array) and not leaf.committed):
        return None
    return getattr(leaf, "sharding", None)
