"""Layers of products and lookups, recurrent cells and attention."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
from flax import nnx

from tests.support.third_party.case import (
    BATCH,
    EVERY_PRODUCT,
    TIME,
    WIDTH,
    Case,
    linen,
    numbers,
    of_eqx,
    of_nnx,
    tokens,
)


def linen_attention() -> Case:
    paths = {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}
    return linen(nn.MultiHeadDotProductAttention(num_heads=2), numbers(BATCH, TIME, WIDTH), paths=paths)


def nnx_attention() -> Case:
    module = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=nnx.Rngs(0))
    paths = {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}
    return of_nnx(module, numbers(BATCH, TIME, WIDTH), paths=paths)


def equinox_attention() -> Case:
    module = eqx.nn.MultiheadAttention(2, WIDTH, key=jax.random.key(0))
    x = numbers(BATCH, TIME, WIDTH)
    paths = {f"{name}_proj/weight" for name in ("query", "key", "value", "output")}
    return of_eqx(module, x, x, x, paths=paths)


class Tied(nn.Module):
    """An embedding that is the head as well."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(7, WIDTH, name="embed")
        return embed.attend(nn.Dense(WIDTH, name="mix")(embed(ids)))


def linen_tied_embedding() -> Case:
    return linen(Tied(), tokens(), paths={"embed/embedding", "mix/kernel"})


class TiedNnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, WIDTH, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.mix(self.embed(ids)))


def nnx_tied_embedding() -> Case:
    return of_nnx(TiedNnx(nnx.Rngs(0)), tokens(), paths={"embed/embedding", "mix/kernel"})


def nnx_embedding() -> Case:
    case = of_nnx(nnx.Embed(7, WIDTH, rngs=nnx.Rngs(0)), tokens(), paths={"embedding"})
    return dataclasses.replace(case, targets={"embedding": EVERY_PRODUCT})


def equinox_embedding() -> Case:
    """Twice under `vmap`, over the batch and over the positions: a gather with a start index map of two parts."""
    module = eqx.nn.Embedding(7, WIDTH, key=jax.random.key(0))
    case = of_eqx(module, tokens(), paths={"weight"}, targets={"weight": EVERY_PRODUCT})
    return dataclasses.replace(case, fun=lambda module, ids: jax.vmap(jax.vmap(module))(ids))


def linen_lstm() -> Case:
    gates = {f"cell/{source}{gate}/kernel" for source in "ih" for gate in "ifgo"}
    return linen(nn.RNN(nn.LSTMCell(6)), numbers(BATCH, TIME, WIDTH), paths=gates)


def linen_optimized_lstm() -> Case:
    """It concatenates the kernels of its gates before it uses them, in every step."""
    gates = {f"cell/{source}{gate}/kernel" for source in "ih" for gate in "ifgo"}
    return linen(nn.RNN(nn.OptimizedLSTMCell(6)), numbers(BATCH, TIME, WIDTH), paths=gates)


def nnx_lstm() -> Case:
    """The name `if` is a word of Python, so NNX has `if_`."""
    module = nnx.RNN(nnx.LSTMCell(WIDTH, 6, rngs=nnx.Rngs(0)))
    gates = {f"cell/{gate}/kernel" for gate in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")}
    return of_nnx(module, numbers(BATCH, TIME, WIDTH), paths=gates)


def equinox_gru() -> Case:
    """One weight for all gates on the left of the product, whose result is split."""
    module = eqx.nn.GRUCell(WIDTH, 6, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, WIDTH), numbers(BATCH, 6), paths={"weight_ih", "weight_hh"})


def linen_einsum() -> Case:
    return linen(nn.Einsum((2, 4, 3), "bthd,hdo->bto"), numbers(BATCH, TIME, 2, 4), paths={"kernel"})


def linen_local_conv() -> Case:
    """A kernel of its own at every position."""
    return linen(nn.ConvLocal(3, (2, 2)), numbers(BATCH, 4, 3, 2), paths={"kernel"})


def linen_dense_general() -> Case:
    """Several axes in, several out, and one that is batched."""
    module = nn.DenseGeneral((3, 2), axis=(-2, -1), batch_dims=(0,))
    return linen(module, numbers(3, BATCH, 4, 2), paths={"kernel"})


def equinox_mlp() -> Case:
    module = eqx.nn.MLP(WIDTH, 3, 12, 2, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, WIDTH), paths={f"layers/{k}/weight" for k in range(3)})


CASES = [
    linen_attention,
    nnx_attention,
    equinox_attention,
    linen_tied_embedding,
    nnx_tied_embedding,
    nnx_embedding,
    equinox_embedding,
    linen_lstm,
    linen_optimized_lstm,
    nnx_lstm,
    equinox_gru,
    linen_einsum,
    linen_local_conv,
    linen_dense_general,
    equinox_mlp,
]
