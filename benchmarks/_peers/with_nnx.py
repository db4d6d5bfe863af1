"""Flax NNX: `nnx.LoRALinear`, and `nnx.LoRA` around an einsum. It has no form for other layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks._peers import forms, layered, tries
from benchmarks._peers.forms import Spec
from benchmarks._peers.layered import Layer


def make(spec: Spec, w: Any, x: Any, *rest: Any) -> nnx.Module:
    """The layer with its LoRA."""
    rngs = nnx.Rngs(0)
    if spec.layer == "dense":
        return nnx.LoRALinear(*w.shape, lora_rank=tries.RANK, use_bias=False, rngs=rngs)
    if spec.layer == "einsum":
        base = nnx.Einsum(spec.equation, w.shape, rngs=rngs)
        out = forms.plain(spec, jnp.asarray(w), jnp.asarray(x))
        return nnx.LoRA(x.shape[-1], tries.RANK, out.shape[-1], base_module=base, rngs=rngs)
    raise NotImplementedError(f"flax.nnx has no LoRA for this layer: {spec.layer}")


def build(spec: Spec, w: Any, *inputs: Any) -> Layer:
    module = make(spec, w, *inputs)
    graph, factors, rest = nnx.split(module, nnx.LoRAParam, ...)

    def apply(w: jax.Array, factors: Any, *inputs: Any) -> jax.Array:
        base = jax.tree.map(lambda leaf: w if leaf.shape == w.shape else leaf, rest)
        return nnx.merge(graph, factors, base)(*inputs)

    def change(factors: Any) -> jax.Array:
        a, b = jax.tree.leaves(factors)
        delta = layered.product("xz,zy->xy", a, b)
        if spec.layer == "dense":
            return delta
        # The products of the last axes, the same ones for every other axis of the weight.
        sides, out = spec.equation.split("->")
        last, weight = sides.split(",")[0][-1], sides.split(",")[1]
        if last not in weight or out[-1] not in weight:
            return jnp.zeros(w.shape)
        others = "".join(letter for letter in weight if letter not in (last, out[-1]))
        ones = np.ones([w.shape[weight.index(letter)] for letter in others], np.float32)
        return layered.product(f"{last}{out[-1]},{others}->{weight}", delta, ones)

    return Layer(factors, apply, change)


attempt = layered.attempts(build)


if __name__ == "__main__":
    tries.main(attempt, "flax")
