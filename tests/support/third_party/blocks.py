"""Blocks of a transformer under the libraries' own scan, remat and vmap."""

from __future__ import annotations

import flax.linen as nn
import jax
from flax import nnx

from tests.support.third_party.case import (
    BATCH,
    TIME,
    WIDTH,
    Case,
    linen,
    numbers,
    of_nnx,
)


class Block(nn.Module):
    """A block of a transformer, as a scan wants it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(x))), None


class Stack(nn.Module):
    """Blocks whose parameters are stacked, rematerialised in the backward pass."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="blocks")(x, None)
        return x


def linen_scan_of_remat() -> Case:
    heads = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    paths = {*heads, "blocks/up/kernel", "blocks/down/kernel"}
    return linen(Stack(), numbers(BATCH, TIME, WIDTH), paths=paths)


class BlockNnx(nnx.Module):
    """A block in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


class StackNnx(nnx.Module):
    """Blocks that `nnx.vmap` makes and `nnx.scan` runs through."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> BlockNnx:
            return BlockNnx(rngs)

        self.blocks = make(rngs)

    def scanned(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, block: BlockNnx) -> jax.Array:
            return block(x)

        return run(x, self.blocks)

    def side_by_side(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None), out_axes=0)(self.blocks, x)


NNX_STACK = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")} | {
    "blocks/up/kernel",
    "blocks/down/kernel",
}


def nnx_scan() -> Case:
    return of_nnx(StackNnx(nnx.Rngs(0)), numbers(BATCH, TIME, WIDTH), paths=NNX_STACK, call="scanned")


def nnx_vmap() -> Case:
    return of_nnx(StackNnx(nnx.Rngs(0)), numbers(BATCH, TIME, WIDTH), paths=NNX_STACK, call="side_by_side")


CASES = [
    linen_scan_of_remat,
    nnx_scan,
    nnx_vmap,
]
