"""Adapter layers (Houlsby et al. 2019, arXiv:1902.00751) inside the models of the examples, in plain Flax.

A bottleneck follows a linear layer, before the residual sum: y + W_up gelu(W_down y + b_down) + b_up.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

# The linear layers of a block that a bottleneck follows. H: both sublayers (Houlsby et al.); L: the MLP alone (Lin et
# al. 2020, arXiv:2004.03829). Adapter^H and Adapter^L of the LoRA paper.
PLACES = {"H": ("out", "down"), "L": ("down",)}

Layers = dict[str, dict[str, jax.Array]]


def bottleneck(layer: dict[str, jax.Array], y: jax.Array) -> jax.Array:
    """The outputs `y` (..., width) of a linear layer, and what the bottleneck adds to them."""
    hidden = jax.nn.gelu(y @ layer["down"] + layer["down_bias"])
    return y + hidden @ layer["up"] + layer["up_bias"]


def new_layer(key: jax.Array, width: int, size: int, stack: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """Random arrays of a bottleneck of `size`, with first axes `stack` for layers that a scan runs."""
    down, up = jax.random.split(key)
    return {
        "down": 0.02 * jax.random.normal(down, (*stack, width, size)),
        "down_bias": jnp.zeros((*stack, size)),
        "up": 0.02 * jax.random.normal(up, (*stack, size, width)),
        "up_bias": jnp.zeros((*stack, width)),
    }


def in_linen(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The apply of a Linen model with bottlenecks, (variables, layers, *args).

    `layers` maps the path of a module, such as `layer_0/attention/out`, to the bottleneck after it.
    """

    def run(variables: Any, layers: Layers, *args: Any) -> Any:
        def intercept(call: Callable[..., Any], inputs: Any, kwargs: Any, context: Any) -> Any:
            out, path = call(*inputs, **kwargs), "/".join(context.module.path)
            return bottleneck(layers[path], out) if context.method_name == "__call__" and path in layers else out

        with nn.intercept_methods(intercept):
            return apply(variables, *args)

    return run


def paths_in_linen(layers: int, kind: str) -> Iterator[str]:
    """The modules of the encoder that a bottleneck of this kind follows."""
    parents = {"out": "attention", "down": "feed_forward"}
    for number in range(layers):
        yield from (f"layer_{number}/{parents[place]}/{place}" for place in PLACES[kind])


class Followed(nnx.Module):
    """A linear layer and the bottleneck after it."""

    def __init__(self, linear: nnx.Module, layer: dict[str, jax.Array]) -> None:
        self.linear = linear
        self.layer = nnx.data({name: nnx.Param(array) for name, array in layer.items()})

    def __call__(self, x: jax.Array) -> jax.Array:
        return bottleneck({name: param[...] for name, param in self.layer.items()}, self.linear(x))


def put_into_nnx(model: Any, kind: str, size: int, key: jax.Array) -> None:
    """Puts bottlenecks of a kind and a size into the scanned layers of a decoder."""
    config = model.config
    parents = {"out": model.layers.attention, "down": model.layers.mlp}
    for place, place_key in zip(PLACES[kind], jax.random.split(key), strict=False):
        layer = new_layer(place_key, config.width, size, (config.layers,))
        setattr(parents[place], place, Followed(getattr(parents[place], place), layer))
