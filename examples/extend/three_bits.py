"""A quantised format outside of jlora: weights in 3 bits, with a scale for every output.

W = (code - 3.5) / 3.5 * scale,    code in 0 ... 7,    eight codes in three bytes
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import jlora
from jlora import extend

_SHIFTS = range(0, 24, 3)  # of the eight codes in 24 bits


@functools.partial(jax.tree_util.register_dataclass, data_fields=["packed", "scale"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class ThreeBits(extend.Quantized):
    """A weight `(*stack, in, out)` in 3 bits.

    Arguments:
        packed: uint8, `(*stack, in, 3 out / 8)`: the codes of eight neighbouring outputs in three bytes.
        scale: float32, `(*stack, 1, out)`: the largest absolute value for every output.
        dtype: of the weight.
    """

    packed: jax.Array
    scale: jax.Array
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] // 3 * 8)

    @property
    def blocks(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.packed.shape[-1] // 3)  # eight neighbouring outputs share three bytes

    def dequantize(self) -> jax.Array:
        triples = self.packed.reshape(*self.packed.shape[:-1], -1, 3).astype(jnp.uint32)
        words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        codes = jnp.stack([words >> shift & 7 for shift in _SHIFTS], axis=-1)
        values = (codes.reshape(self.shape).astype(jnp.float32) - 3.5) / 3.5
        return (values * self.scale).astype(self.dtype)

    def requantize(self, weight: jax.Array) -> "ThreeBits":
        return quantize(weight.astype(self.dtype))


def quantize(weight: jax.Array) -> ThreeBits:
    """Rounds a weight `(*stack, in, out)` to 3 bits; out is a multiple of 8."""
    scale = jnp.abs(weight).max(axis=-2, keepdims=True).astype(jnp.float32)
    relative = weight.astype(jnp.float32) / jnp.where(scale == 0, 1, scale)
    codes = jnp.clip(jnp.round(relative * 3.5 + 3.5), 0, 7).astype(jnp.uint32)
    groups = codes.reshape(*codes.shape[:-1], -1, 8)
    words = sum(groups[..., k] << shift for k, shift in enumerate(_SHIFTS))
    triples = jnp.stack([words & 255, words >> 8 & 255, words >> 16], axis=-1).astype(jnp.uint8)
    return ThreeBits(triples.reshape(*codes.shape[:-1], -1), scale, weight.dtype)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"layers": jax.random.normal(keys[0], (3, 16, 16)) / 4, "head": jax.random.normal(keys[1], (16, 24))}
    x = jax.random.normal(keys[2], (4, 16))

    def model(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return x @ params["head"]

    sites = jlora.trace(model, params, x)
    quantized = jlora.quantize(params, sites, {".*": lambda weight, site: quantize(weight)})
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    print(f"{stored} bytes instead of {sum(leaf.nbytes for leaf in jax.tree.leaves(params))}")
    adapter = jlora.init(keys[3], sites, jlora.LoRA(rank=2))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    adapted = jax.jit(jlora.adapt(model, on_dense="error"))(quantized, adapter, x)
    merged = model(jlora.merge(quantized, adapter), x)
    assert jnp.allclose(adapted, merged, rtol=1e-4, atol=1e-4)
    error = jnp.abs(quantized["head"].dequantize() - params["head"]) / quantized["head"].scale
    assert error.max() <= 0.5 / 3.5 + 1e-6  # half a step
    print("adapted and merged agree")


if __name__ == "__main__":
    main()
