"""Weights to quantise, and the toy model on a quantised base."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jlora
from jlora.quantized import GGUF
from tests.support import toy_model

FORMS = ["nf4", "int8", "int4", "fp8"]


def weight(*shape: int) -> np.ndarray:
    """Normal numbers, the same for the same shape."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def in_blocks(table: np.ndarray, transposed: bool = False) -> GGUF:
    """The table in Q4_0 blocks of GGUF."""
    empty = GGUF(jnp.zeros((0, 18), jnp.uint8), "Q4_0", transposed)
    return empty.requantize(jnp.asarray(table))


def quantized(form: str) -> dict:
    """Parameters of the toy model, with all weights of products and lookups in one format."""
    return jlora.quantize(toy_model.params(), toy_model.sites(), {"embed|mix/kernel|layers/(up|down)": form})
