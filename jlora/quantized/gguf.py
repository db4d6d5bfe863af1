"""Blocks of GGUF files as they lie there: Q4_0, Q4_1 and Q8_0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jlora._tree.leaves import Quantized

BLOCK = 32
_FLOAT32 = jnp.dtype(jnp.float32)
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of a block: one or two halves of scale and least value, then codes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["kind", "transposed", "dtype"])
@dataclasses.dataclass(frozen=True)
class GGUF(Quantized):
    """A matrix, or a stack of them, as the bytes of a GGUF file.

        Q4_0: W = scale * (code - 8)        Q4_1: W = scale * code + least        Q8_0: W = scale * code

    Arguments:
        data: uint8 `(*stack, rows, bytes)`, as the file has it: of every 32 entries of a row a scale (float16), for
            Q4_1 a least value (float16), and the codes; of 4-bit ones, byte j holds entries j and 16 + j.
        kind: `"Q4_0"`, `"Q4_1"` or `"Q8_0"`.
        transposed: whether the program's weight is `(*stack, columns, rows)`, as a kernel `(in, out)` is of the file's
            `(out, in)`.
        dtype: of the weight.
    """

    data: jax.Array
    kind: str
    transposed: bool = False
    dtype: jnp.dtype = _FLOAT32

    def __post_init__(self) -> None:
        if self.kind not in BYTES:
            raise ValueError(f"{self.kind} is none of {', '.join(BYTES)}: dequantise the tensor with gguf.dequantize.")
        shape = getattr(self.data, "shape", None)
        if shape and shape[-1] % BYTES[self.kind]:
            raise ValueError(f"Rows of {self.kind} have a multiple of {BYTES[self.kind]} bytes, and these {shape[-1]}.")

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, size = self.data.shape
        columns = size // BYTES[self.kind] * BLOCK
        return (*rest[:-1], columns, rest[-1]) if self.transposed else (*rest, columns)

    @property
    def rowwise(self) -> bool:
        return self.data.ndim > 2 or not self.transposed

    def dequantize(self) -> jax.Array:
        blocks = self.data.reshape(*self.data.shape[:-1], -1, BYTES[self.kind])
        scale = _half(blocks[..., 0:2])
        if self.kind == "Q8_0":
            values = scale * lax.bitcast_convert_type(blocks[..., 2:], jnp.int8).astype(jnp.float32)
        else:
            packed = blocks[..., -16:]
            codes = jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.float32)
            values = scale * codes + _half(blocks[..., 2:4]) if self.kind == "Q4_1" else scale * (codes - 8)
        values = values.astype(self.dtype).reshape(*self.data.shape[:-1], -1)
        return values.mT if self.transposed else values

    def requantize(self, weight: jax.Array) -> "GGUF":
        rows = (weight.mT if self.transposed else weight).astype(jnp.float32)
        blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
        least = blocks.min(axis=-1, keepdims=True)
        if self.kind == "Q4_1":
            scale = _rounded((blocks.max(axis=-1, keepdims=True) - least) / 15)
            head, start, top = [scale, _rounded(least)], _rounded(least), 15
        else:
            furthest = jnp.take_along_axis(blocks, jnp.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
            scale = _rounded(furthest / -8 if self.kind == "Q4_0" else jnp.abs(furthest) / 127)
            head, start, top = [scale], -8 * scale, 15
        steps = 1 / jnp.where(scale == 0, 1, scale)
        if self.kind == "Q8_0":
            codes = lax.bitcast_convert_type(jnp.round(blocks * steps).astype(jnp.int8), jnp.uint8)
        else:
            whole = jnp.clip(jnp.round((blocks - start) * steps), 0, top).astype(jnp.uint8)
            codes = whole[..., :16] | (whole[..., 16:] << 4)
        halves = [lax.bitcast_convert_type(h.astype(jnp.float16), jnp.uint8).reshape(*h.shape[:-1], 2) for h in head]
        data = jnp.concatenate([*halves, codes], axis=-1).reshape(*rows.shape[:-1], -1)
        return dataclasses.replace(self, data=data)


def _half(data: jax.Array) -> jax.Array:
    """Two bytes as the float16 that they are, with an axis of size one."""
    return lax.bitcast_convert_type(data, jnp.float16)[..., None].astype(jnp.float32)


def _rounded(value: jax.Array) -> jax.Array:
    return value.astype(jnp.float16).astype(jnp.float32)
