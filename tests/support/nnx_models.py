"""Modules of Flax NNX that keep state, and numbers for which their products are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora

WIDTH = 4


class Normalised(nnx.Module):
    """Batch statistics and dropout behind an adapted layer, and a method besides the call."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(6, 3, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norm(self.up(x)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.features(x))


class Recurrent(nnx.Module):
    """Carries of a recurrent layer, with counts of random numbers for the first carry."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.SimpleCell(WIDTH, 5, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        return self.rnn(x[None], return_carry=True)


class Tied(nnx.Module):
    """One embedding in three places: a lookup, the head, and a module of its own that holds the same Variable."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, WIDTH, rngs=rngs)
        self.again = nnx.Embed(7, WIDTH, rngs=rngs)
        self.again.embedding = self.embed.embedding

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.again.attend(self.embed(ids) + self.again(ids))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.round(self.norm(self.linear(x)))


class Scanned(nnx.Module):
    """A stack of layers that `nnx.vmap` creates and `nnx.scan` runs, and a method under `nnx.jit`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        block: Any = Block
        make: Any = nnx.vmap(block, in_axes=0, out_axes=0)
        self.layers = make(rngs.split(2))
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    @nnx.jit
    def logits(self, x: jax.Array) -> jax.Array:
        return self.head(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(x: Any, layer: Any) -> Any:
            return layer(x)

        scan: Any = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        logits: Any = self.logits
        return logits(scan(x, self.layers))


class Decoder(nnx.Module):
    """Attention that keeps keys and values of earlier steps."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=rngs)
        self.attention.init_cache((1, 3, WIDTH))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(x[:1, None])


@dataclasses.dataclass(frozen=True)
class Case:
    """A module with an input.

    Arguments:
        module: the module; its Params are small integers.
        x: the input, integers too.
        targets: for `jlora.nnx.adapt`.
        paths: those that the targets select.
    """

    module: nnx.Module
    x: jax.Array
    targets: dict[str, Any]
    paths: list[str]

    def adapted(self, **kwargs: Any) -> Any:
        """The adapted module, with factors that are integers other than zero."""
        model = jlora.nnx.adapt(self.module, self.targets, self.x, rngs=nnx.Rngs(1), **kwargs)
        jlora.nnx.set_adapter(model, integers(jlora.nnx.adapter(model)))
        return model


def integers(tree: Any, seed: int = 0) -> Any:
    """A tree with small integers in the place of its arrays, so that sums of their products are exact in any order."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.integers(-2, 3, a.shape), a.dtype), tree)


def with_integers(module: Any) -> Any:
    """The module, with small integers in its Params."""
    nnx.update(module, integers(nnx.state(module, nnx.Param), 1))
    return module


LORA = jlora.LoRA(2, alpha=2.0)
CASES: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], list[str]]] = {
    "batch_norm": (Normalised, ["down/kernel", "up/kernel"]),
    "recurrent": (Recurrent, ["rnn/cell/dense_h/kernel", "rnn/cell/dense_i/kernel"]),
    "shared": (Tied, ["again/embedding"]),
    "scanned": (Scanned, ["head/kernel", "layers/linear/kernel"]),
    "decode_cache": (Decoder, [f"attention/{name}/kernel" for name in ("key", "out", "query", "value")]),
}


def case(name: str) -> Case:
    """A case of the catalogue.

    Arguments:
        name: of `CASES`.
    """
    make, paths = CASES[name]
    module = with_integers(make(nnx.Rngs(0)))
    x = jnp.arange(4) if name == "shared" else integers(jnp.ones((4, WIDTH)), 2)
    return Case(module, x, dict.fromkeys(paths, LORA), paths)


def same_state(actual: nnx.Pytree, expected: nnx.Pytree) -> None:
    """Asserts that two modules of one class are equal to the bit in all but their Params, and in their attributes."""

    def same(a: jax.Array, b: jax.Array) -> None:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    states = [nnx.state(module, nnx.Not(nnx.Param)) for module in (actual, expected)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert nnx.graphdef(actual) == nnx.graphdef(expected)
    jax.tree.map(same, *states)
