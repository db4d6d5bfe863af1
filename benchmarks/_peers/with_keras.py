"""Keras 3 on JAX: layers with `enable_lora`."""

import importlib
import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax

from benchmarks._peers import forms, layered, tries
from benchmarks._peers.forms import Spec
from benchmarks._peers.layered import Layer
from tests.support.weight_uses import bend

keras: Any = importlib.import_module("keras")


class Raw(keras.layers.Layer):
    """A layer that holds a weight and uses it in a way of its own."""

    def __init__(self, spec: Spec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape

    def build(self, *shapes: Any) -> None:
        self.w = self.add_weight(shape=self.shape, name="w")

    def call(self, batch: Any) -> jax.Array:
        assert self.spec.use is not None
        return self.spec.use({"w": self.w.value, **batch["rest"]}, batch["inputs"])


def make(spec: Spec, shape: tuple[int, ...], out: Any, x: Any) -> Any:
    """The layer without its factors."""
    if spec.layer == "dense":
        return keras.layers.Dense(shape[-1], use_bias=False)
    if spec.layer == "einsum":
        return keras.layers.EinsumDense(spec.equation, out.shape[1:])
    if spec.layer == "embed":
        return keras.layers.Embedding(*shape)
    if spec.layer == "tied":
        return keras.layers.ReversibleEmbedding(*shape)
    if spec.layer == "raw":
        return Raw(spec, shape)
    options = dict(spec.options)
    common = {"strides": options.get("strides", 1), "padding": padding(spec), "use_bias": False}
    if spec.layer == "conv_transpose":
        return keras.layers.Conv2DTranspose(shape[-1], shape[:-2], **common)
    layer = getattr(keras.layers, f"Conv{len(shape) - 2}D")
    groups, dilation = options.get("groups", 1), options.get("dilation", 1)
    return layer(shape[-1], shape[:-2], groups=groups, dilation_rate=dilation, **common)


def padding(spec: Spec) -> str:
    value = spec.options.get("padding", "SAME")
    return value.lower() if isinstance(value, str) else "valid"


def prepared(spec: Spec, x: Any) -> Any:
    """Inputs with the padding that the layer cannot express."""
    pads = spec.options.get("padding", "SAME")
    return x if isinstance(pads, str) else jax.numpy.pad(x, ((0, 0), *pads, (0, 0)))


def build(spec: Spec, w: Any, *inputs: Any) -> Layer:
    out = jax.eval_shape(lambda *args: forms.plain(spec, *args), w, *inputs)
    layer = make(spec, w.shape, out, *inputs[:1])
    first = jax.numpy.asarray(prepared(spec, inputs[0])) if spec.layer != "raw" else inputs[0]
    layer(first)
    layer.enable_lora(tries.RANK, lora_alpha=tries.ALPHA)
    factors = [v.value for v in layer.trainable_variables]

    def apply(w: jax.Array, factors: Any, *inputs: Any) -> jax.Array:
        frozen = [w]
        run = layer.stateless_call
        if spec.layer != "tied":
            return run(factors, frozen, prepared(spec, inputs[0]))[0]
        h = bend(run(factors, frozen, inputs[0])[0] + inputs[1])
        return run(factors, frozen, h, reverse=True)[0]

    def change(factors: Any) -> jax.Array:
        a, b = factors
        return tries.ALPHA / tries.RANK * layered.product("...z,zy->...y", a, b)

    return Layer(factors, apply, change)


attempt = layered.attempts(build)


if __name__ == "__main__":
    tries.main(attempt, "keras")
