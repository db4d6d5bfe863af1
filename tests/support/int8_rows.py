"""A quantised form for weights of any shape: 8 bits, and a scale for every row."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Rounded(jlora.Quantized):
    codes: Any
    scale: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def rowwise(self) -> bool:
        return True

    def dequantize(self) -> jax.Array:
        return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)

    def requantize(self, weight: jax.Array) -> Rounded:
        scale = jnp.abs(weight).max(axis=-1, keepdims=True).astype(jnp.float32) / 127
        return Rounded(jnp.round(weight / scale).astype(jnp.int8), scale, weight.dtype)


def rounded(weight: np.ndarray) -> Rounded:
    scale = np.maximum(np.abs(weight.astype(np.float32)).max(axis=-1, keepdims=True, initial=0), 1e-30) / 127
    codes = np.round(weight.astype(np.float32) / scale).astype(np.int8)
    return Rounded(codes, scale.astype(np.float32), jnp.dtype(weight.dtype))
