"""gemma's peft: a model of Flax Linen whose dense and einsum layers an interceptor replaces by LoRA layers.

The rule of what is replaced is that of `gemma.gm.nn.LoRA`, which needs more packages than `gemma.peft` does.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks._peers import layered, linen, tries
from benchmarks._peers.forms import Spec
from benchmarks._peers.layered import Layer

peft: Any = importlib.import_module("gemma.peft")

LAYERS = {nn.Dense: peft.LoRADense, nn.Einsum: peft.LoRAEinsum, nn.DenseGeneral: peft.LoRADenseGeneral}


def replace(module: nn.Module) -> nn.Module:
    layer = LAYERS.get(type(module))
    return module if layer is None else layer(rank=tries.RANK, dtype=jnp.float32, wrapped=module)


class Adapted(nn.Module):
    """The model in the interceptor."""

    model: nn.Module

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is not None:
            nn.share_scope(self, self.model)

    @nn.compact
    def __call__(self, *inputs: Any) -> jax.Array:
        with peft.ModuleInterceptor(replace):
            return self.model(*inputs)


def build(spec: Spec, w: Any, *inputs: Any) -> Layer:
    model = Adapted(linen.Model(spec, w.shape))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    factors = linen.added(params, linen.weights(spec, w))

    def change(factors: Any) -> jax.Array:
        pair = factors["layer"]["lora"]
        return layered.einsum_change(spec.equation or "bi,io->bo", pair["a"], pair["b"])

    def apply(w: jax.Array, factors: Any, *inputs: Any) -> Any:
        return model.apply({"params": linen.with_weights(spec, w, factors)}, *inputs)

    return Layer(factors, apply, change)


attempt = layered.attempts(build)


if __name__ == "__main__":
    tries.main(attempt, "gemma", "flax")
