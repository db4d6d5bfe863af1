"""4-bit NormalFloat, the quantised base of QLoRA."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora._tree.leaves import Quantized

# The 16 values of Dettmers et al. 2023, arXiv:2305.14314, appendix E: quantiles of a normal distribution.
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale", "unit", "mean"], meta_fields=["axis", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class NF4(Quantized):
    """A weight in 4-bit NormalFloat with a scale for each block; the scales themselves have 8 bits.

        W = VALUES[codes] * scale,    scale = mean + unit * scale8

    Arguments:
        codes: uint8, of the weight's shape with half the size along `axis`. In a block of 2k entries, byte j holds
            entry j in its low bits and entry k + j in its high bits.
        scale: int8 (a float dtype if scales are not quantised), of the weight's shape with one entry for each block.
        unit, mean: float32, one for each group of scales along the last axis; None if scales are not quantised.
        axis: of the blocks, counted from the end (negative), so that a slice of a stack has the same.
        dtype: of the weight.

    Dettmers et al. 2023, arXiv:2305.14314.
    """

    codes: jax.Array
    scale: jax.Array
    unit: jax.Array | None
    mean: jax.Array | None
    axis: int
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    @property
    def rowwise(self) -> bool:
        return -self.axis < self.codes.ndim

    @property
    def blocks(self) -> tuple[int, ...]:
        blocks = list(self.shape)
        blocks[self.axis] = self.scale.shape[self.axis]
        return tuple(blocks)

    def dequantize(self) -> jax.Array:
        blocks = self.scale.shape[self.axis]
        axis = self.axis % self.codes.ndim
        codes = _split(self.codes, axis, blocks)
        unpacked = jnp.concatenate([codes & 15, codes >> 4], axis=axis + 1)
        values = _look_up(unpacked) * jnp.expand_dims(self.float_scale(), axis + 1)
        return values.reshape(self.shape).astype(self.dtype)

    def float_scale(self) -> jax.Array:
        """The scale of every block in float32: mean + unit * scale8."""
        if self.unit is None or self.mean is None:
            return self.scale.astype(jnp.float32)
        groups = self.unit.shape[-1]
        grouped = _split(self.scale, self.scale.ndim - 1, groups).astype(jnp.float32)
        return (grouped * self.unit[..., None] + self.mean[..., None]).reshape(self.scale.shape)

    def requantize(self, weight: jax.Array) -> "NF4":
        block = self.shape[self.axis] // self.scale.shape[self.axis]
        group = None if self.unit is None else self.scale.shape[-1] // self.unit.shape[-1]
        return quantize(weight.astype(self.dtype), self.axis, block, group)


def quantize(weight: jax.Array, axis: int, block: int = 64, group: int | None = 256) -> NF4:
    """Rounds a weight to 4-bit NormalFloat.

    Arguments:
        weight: floating-point.
        axis: of the blocks; for a matmul the axis that it contracts.
        block: the number of entries that share a scale; if it does not divide the axis, their greatest common divisor.
        group: the number of scales along the last axis that are rounded to 8 bits together, or its greatest common
            divisor with that axis; None keeps the scales in float32.

    Returns:
        the weight in 4 bits.

    Raises:
        ValueError: if the axis has an odd size, so that two codes of a block cannot share a byte.

    Example:
        nf4.quantize(jnp.ones((128, 256), jnp.bfloat16), axis=0).dequantize()
    """
    axis = axis % weight.ndim
    block = math.gcd(block, weight.shape[axis])
    if block % 2:
        raise ValueError(
            f"A byte holds two 4-bit codes, and axis {axis} of {weight.shape} has no blocks of even size. Choose "
            "another axis, or another format."
        )
    split = _split(weight.astype(jnp.float32), axis, weight.shape[axis] // block)
    scale = jnp.abs(split).max(axis=axis + 1)
    unit = mean = None
    if group is not None:
        groups = scale.shape[-1] // math.gcd(group, scale.shape[-1])
        grouped = _split(scale, scale.ndim - 1, groups)
        mean = grouped.mean(axis=-1)
        unit = jnp.maximum(jnp.abs(grouped - mean[..., None]).max(axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
        rounded = jnp.round((grouped - mean[..., None]) / unit[..., None])
        scale = rounded.reshape(scale.shape).astype(jnp.int8)
    without_codes = NF4(jnp.zeros((0,), jnp.uint8), scale, unit, mean, axis - weight.ndim, weight.dtype)
    rounded_scale = jnp.expand_dims(without_codes.float_scale(), axis + 1)
    relative = split / jnp.where(rounded_scale == 0, 1, rounded_scale)
    midpoints = [(a + b) / 2 for a, b in itertools.pairwise(VALUES)]
    codes = jnp.searchsorted(jnp.asarray(midpoints, jnp.float32), relative).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=axis + 1)
    shape = list(weight.shape)
    shape[axis] //= 2
    return dataclasses.replace(without_codes, codes=(low | (high << 4)).reshape(shape))


def _coefficients() -> list[float]:
    """The coefficients of the polynomial in the four bits of a code, linear in each, whose values are `VALUES`."""
    coefficients = list(VALUES)
    for bit in range(4):
        coefficients = [c - coefficients[k ^ 1 << bit] if k >> bit & 1 else c for k, c in enumerate(coefficients)]
    return coefficients


def _look_up(codes: jax.Array) -> jax.Array:
    """VALUES[codes] to the last bits, by sums and products: XLA fuses these into a matmul, but not a gather."""
    sums: list[Any] = [jnp.float32(c) for c in _coefficients()]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(jnp.float32)
        sums = [low + is_set * high for low, high in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _split(array: jax.Array, axis: int, count: int) -> jax.Array:
    """Splits an axis into two: `count` blocks, and the entries of a block."""
    return array.reshape(*array.shape[:axis], count, -1, *array.shape[axis + 1 :])
