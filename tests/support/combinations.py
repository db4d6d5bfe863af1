"""The adapters and rules of `golden/combine.py`, and what jlora drops at random in them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

DENSITY = 0.4

# Torch's shape of each layer's weight, the axes of torch in the order of jlora's weight, and the roles of those.
KINDS = {"linear": (14, 10), "square": (12, 12), "embedding": (15, 8), "conv": (6, 4, 3, 3)}
ORDER = {"linear": (1, 0), "square": (1, 0), "embedding": (0, 1), "conv": (2, 3, 1, 0)}
ROLES: dict[str, tuple[Any, ...]] = dict.fromkeys(KINDS, ("in", "out")) | {"conv": ("window", "window", "in", "out")}

# Rank, alpha, and whether it is stabilised. PEFT scales the result by the first one's rule, so that must not be.
CONFIGS = {"films": (2, 3, False), "tweets": (3, 4, True), "letters": (2, 2, False)}

# PEFT's name, the weights, and options. PEFT elects signs before it applies weights, so those of an election are equal.
UNEQUAL, EQUAL, RANK = [0.7, -0.4, 1.5], [0.5, 0.5, 0.5], {"svd_rank": 3}
RULES: dict[str, tuple[str, list[float], dict[str, Any]]] = {
    "concat": ("cat", UNEQUAL, {}),
    "svd": ("svd", UNEQUAL, RANK),
    "ties": ("ties_svd", EQUAL, RANK | {"density": DENSITY}),
    "dare": ("dare_linear_svd", UNEQUAL, RANK | {"density": DENSITY}),
    "dare_ties": ("dare_ties_svd", EQUAL, RANK | {"density": DENSITY}),
    "magnitude": ("magnitude_prune_svd", UNEQUAL, RANK | {"density": DENSITY}),
}


def key() -> jax.Array:
    """The key of what is dropped."""
    return jax.random.key(3)


def shape(kind: str) -> tuple[int, ...]:
    """The shape of jlora's weight."""
    return tuple(KINDS[kind][axis] for axis in ORDER[kind])


def drop_masks(kind: str) -> np.ndarray:
    """What jlora keeps of each adapter's change, `(adapters, *torch's shape)`: what it keeps of ones."""
    sizes = shape(kind)
    n_out = sizes[-1]
    n_in = int(np.prod(sizes)) // n_out
    ones = jnp.ones((n_in, n_out))
    masks = []
    for chosen in CONFIGS:
        adapters = {}
        for name in CONFIGS:
            a = ones if name == chosen else jnp.zeros_like(ones)
            factors = {"a": a.reshape(*sizes[:-1], n_out), "b": jnp.eye(n_out)}
            adapters[name] = {kind: jlora.Update(factors, jlora.LoRA(n_out), ROLES[kind], sizes)}
        kept, _ = jlora.combine(adapters, how="dare", density=DENSITY, key=key(), rank=n_out)
        delta = np.asarray(jlora.merge({kind: jnp.zeros(sizes)}, kept)[kind])
        masks.append((delta > 1).astype(np.float32).transpose(np.argsort(ORDER[kind])))
    return np.stack(masks)
