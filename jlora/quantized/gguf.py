"""Blocks of GGUF files in the layout of the file: Q4_0, Q4_1 and Q8_0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jlora._tree.leaves import Quantized

BLOCK = 32
_FLOAT32 = jnp.dtype(jnp.float32)
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of a block: one or two float16 (scale, minimum), then the codes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["kind", "transposed", "dtype"])
@dataclasses.dataclass(frozen=True)
class GGUF(Quantized):
    """A matrix, or a stack of them, as the bytes of a GGUF file.

        Q4_0: W = scale * (code - 8)        Q4_1: W = scale * code + minimum        Q8_0: W = scale * code

    Arguments:
        data: uint8 `(*stack, rows, bytes)`, as in the file. Each block of 32 entries of a row has a scale (float16),
            for Q4_1 a minimum (float16), and the codes. With 4-bit codes, byte j holds entries j and 16 + j.
        kind: `"Q4_0"`, `"Q4_1"` or `"Q8_0"`.
        transposed: whether the program's weight is `(*stack, columns, rows)`: a kernel `(in, out)`, if the file has
            `(out, in)`.
        dtype: of the weight.

    Raises:
        ValueError: if `kind` is not one of those three, or the row length is not a multiple of the block size.

    Example:
        data = jnp.asarray(tensor.data)  # `tensor` from gguf.GGUFReader("model.gguf").tensors
        params["mlp"]["kernel"] = GGUF(data, tensor.tensor_type.name, transposed=True)
    """

    data: jax.Array
    kind: str
    transposed: bool = False
    dtype: jnp.dtype = _FLOAT32

    def __post_init__(self) -> None:
        if self.kind not in BYTES:
            raise ValueError(
                f"GGUF reads {', '.join(BYTES)}; the tensor is {self.kind}. Dequantise it with gguf.dequantize."
            )
        shape = getattr(self.data, "shape", None)
        if shape and shape[-1] % BYTES[self.kind]:
            raise ValueError(
                f"Rows of {self.kind} must have a multiple of {BYTES[self.kind]} bytes; these have {shape[-1]}. Pass "
                "the bytes of the file, with one row of the matrix in each row."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, size = self.data.shape
        columns = size // BYTES[self.kind] * BLOCK
        return (*rest[:-1], columns, rest[-1]) if self.transposed else (*rest, columns)

    @property
    def rowwise(self) -> bool:
        return self.data.ndim > 2 or not self.transposed

    @property
    def axis_order(self) -> tuple[int, ...]:
        *stack, a, b = range(self.data.ndim)
        return (*stack, b, a) if self.transposed else (*stack, a, b)

    @property
    def blocks(self) -> tuple[int, ...]:
        blocks = list(self.shape)
        blocks[self.axis_order[-1]] //= BLOCK
        return tuple(blocks)

    def dequantize(self) -> jax.Array:
        blocks = self.data.reshape(*self.data.shape[:-1], -1, BYTES[self.kind])
        scale = _from_float16(blocks[..., 0:2])
        if self.kind == "Q8_0":
            values = scale * lax.bitcast_convert_type(blocks[..., 2:], jnp.int8).astype(jnp.float32)
        else:
            packed = blocks[..., -16:]
            codes = jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.float32)
            values = scale * codes + _from_float16(blocks[..., 2:4]) if self.kind == "Q4_1" else scale * (codes - 8)
        values = values.astype(self.dtype).reshape(*self.data.shape[:-1], -1)
        return values.mT if self.transposed else values

    def requantize(self, weight: jax.Array) -> "GGUF":
        rows = (weight.mT if self.transposed else weight).astype(jnp.float32)
        blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
        if self.kind == "Q8_0":
            scale = _to_float16(jnp.abs(blocks).max(axis=-1, keepdims=True) / 127)
            rounded = jnp.round(blocks * _reciprocal(scale)).astype(jnp.int8)
            parts = [_float16_bytes(scale), lax.bitcast_convert_type(rounded, jnp.uint8)]
        elif self.kind == "Q4_1":
            minimum = blocks.min(axis=-1, keepdims=True)
            scale = _to_float16((blocks.max(axis=-1, keepdims=True) - minimum) / 15)
            minimum = _to_float16(minimum)
            parts = [_float16_bytes(scale), _float16_bytes(minimum), _pack((blocks - minimum) * _reciprocal(scale))]
            parts = self._with_shifted_minima(blocks, parts)
        else:
            largest = jnp.take_along_axis(blocks, jnp.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
            scale = _to_float16(largest / -8)
            parts = [_float16_bytes(scale), _pack((blocks + 8 * scale) * _reciprocal(scale))]
        data = jnp.concatenate(parts, axis=-1).reshape(*rows.shape[:-1], -1)
        return dataclasses.replace(self, data=data)

    def _with_shifted_minima(self, blocks: jax.Array, parts: list[jax.Array]) -> list[jax.Array]:
        """The parts of Q4_1 blocks; those that differ from this weight's by a constant keep their codes and scales."""
        old = self.data.reshape(*self.data.shape[:-1], -1, BYTES[self.kind])
        if old.shape[:-1] != blocks.shape[:-1]:
            return parts
        values = self.dequantize()
        change = blocks - (values.mT if self.transposed else values).astype(jnp.float32).reshape(blocks.shape)
        lowest, highest = (extreme(change, axis=-1, keepdims=True) for extreme in (jnp.min, jnp.max))
        largest = jnp.abs(blocks).max(axis=-1, keepdims=True)
        is_shift = highest - lowest <= 8 * jnp.finfo(self.dtype).eps * largest
        minimum = _from_float16(old[..., 2:4]) + (lowest + highest) / 2
        shifted = [old[..., :2], _float16_bytes(_to_float16(minimum)), old[..., 4:]]
        return [jnp.where(is_shift, new, part) for new, part in zip(shifted, parts, strict=True)]


def _from_float16(data: jax.Array) -> jax.Array:
    """Two bytes as the float16 that they hold, widened to float32, with an axis of size 1."""
    return lax.bitcast_convert_type(data, jnp.float16)[..., None].astype(jnp.float32)


def _float16_bytes(value: jax.Array) -> jax.Array:
    """The inverse of `_from_float16`."""
    return lax.bitcast_convert_type(value.astype(jnp.float16), jnp.uint8).reshape(*value.shape[:-1], 2)


def _to_float16(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float16).astype(jnp.float32)


def _reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale; 1 for a block of zeros."""
    return 1 / jnp.where(scale == 0, 1, scale)


def _pack(codes: jax.Array) -> jax.Array:
    """Codes from 0 to 15, not yet rounded: two in a byte, those of the second half of a block in the high bits."""
    rounded = jnp.clip(jnp.round(codes), 0, 15).astype(jnp.uint8)
    return rounded[..., :16] | (rounded[..., 16:] << 4)
