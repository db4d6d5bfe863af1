"""Flax NNX: a module in, a module out.

    model = jlora.nnx.adapt(model, {r".*(query|value)/kernel": jlora.LoRA(8)}, x, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)
    plain = jlora.nnx.merge(model)

The only part of jlora that imports Flax.
"""

from jlora.nnx.api import adapt as adapt
from jlora.nnx.api import adapter as adapter
from jlora.nnx.api import base as base
from jlora.nnx.api import explain as explain
from jlora.nnx.api import merge as merge
from jlora.nnx.api import set_adapter as set_adapter
from jlora.nnx.api import trace as trace
from jlora.nnx.factors import Factors as Factors
from jlora.nnx.factors import FrozenFactor as FrozenFactor

__all__ = ["Factors", "FrozenFactor", "adapt", "adapter", "base", "explain", "merge", "set_adapter", "trace"]
