"""qwix: a model of Flax with its LoRA provider, which intercepts products inside modules."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from benchmarks._peers import layered, linen, tries
from benchmarks._peers.forms import Spec
from benchmarks._peers.layered import Layer


class Einsum(nnx.Module):
    """An einsum of NNX: qwix cannot adapt that of Linen."""

    def __init__(self, spec: Spec, shape: tuple[int, ...]) -> None:
        self.layer = nnx.Einsum(spec.equation, shape, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def build_einsum(spec: Spec, w: Any, x: Any) -> Layer:
    model = qwix.apply_lora_to_model(Einsum(spec, w.shape), provider(), x, rngs=nnx.Rngs(0))
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def apply(w: jax.Array, factors: Any, x: jax.Array) -> jax.Array:
        base = jax.tree.map(lambda leaf: w if leaf.shape == w.shape else leaf, rest)
        return nnx.merge(graph, factors, base)(x)

    return Layer(factors, apply, lambda factors: change(spec, w.shape, factors))


def provider() -> qwix.LoraProvider:
    return qwix.LoraProvider(module_path=".*", rank=tries.RANK, alpha=tries.ALPHA)


def change(spec: Spec, shape: tuple[int, ...], factors: Any) -> jax.Array:
    """`s A B`: of a product, of an einsum, or of a convolution's kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(factors)
    pair = {re.findall(r"lora_[ab]", jax.tree_util.keystr(path))[0]: leaf for path, leaf in leaves}
    a, b, scale = pair["lora_a"], pair["lora_b"], tries.ALPHA / tries.RANK
    if spec.layer == "einsum":
        return scale * layered.einsum_change(spec.equation, a, b)
    delta = scale * layered.product("...Z,Zo->...o", a, b)
    if spec.layer == "tied":
        return delta.T
    if spec.options.get("transpose_kernel"):
        return jnp.flip(delta.swapaxes(-1, -2), (0, 1))
    return delta.reshape(shape)


def build(spec: Spec, w: Any, *inputs: Any) -> Layer:
    if spec.layer == "einsum":
        return build_einsum(spec, w, *inputs)
    model: Any = qwix.apply_lora_to_model(linen.Model(spec, w.shape), provider())
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    factors = linen.added(params, linen.weights(spec, w))

    def apply(w: jax.Array, factors: Any, *inputs: Any) -> jax.Array:
        return model.apply({"params": linen.with_weights(spec, w, factors)}, *inputs)

    return Layer(factors, apply, lambda factors: change(spec, w.shape, factors))


attempt = layered.attempts(build)


if __name__ == "__main__":
    tries.main(attempt, "qwix", "flax")
