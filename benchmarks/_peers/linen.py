"""The layers of a form as modules of Flax Linen, for the libraries that adapt such modules."""

from typing import Any

import jax
from flax import linen as nn

from benchmarks._peers.forms import Spec
from tests.support.weight_uses import bend

NAMES = {"embed": "embedding", "raw": "w"}


class Raw(nn.Module):
    """A module that holds a weight and uses it in a way of its own."""

    shape: tuple[int, ...]
    spec: Spec

    @nn.compact
    def __call__(self, batch: Any) -> jax.Array:
        w = self.param("w", nn.initializers.zeros, self.shape)
        assert self.spec.use is not None
        return self.spec.use({"w": w, **batch["rest"]}, batch["inputs"])


class Tied(nn.Module):
    """An embedding that is the kernel of the output, too."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, rows: jax.Array, x: jax.Array) -> jax.Array:
        table = nn.Embed(self.rows, self.width, name="table")
        return table.attend(bend(table(rows) + x))


class Model(nn.Module):
    """The layer of a spec, inside a model, as a library meets it."""

    spec: Spec
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, *inputs: Any) -> jax.Array:
        spec, shape, options = self.spec, self.shape, dict(self.spec.options)
        if spec.layer == "dense":
            return nn.Dense(shape[-1], use_bias=False, name="layer")(*inputs)
        if spec.layer == "einsum":
            return nn.Einsum(shape, spec.equation, use_bias=False, name="layer")(*inputs)
        if spec.layer == "embed":
            return nn.Embed(shape[0], shape[1], name="layer")(*inputs)
        if spec.layer == "tied":
            return Tied(shape[0], shape[1], name="layer")(*inputs)
        if spec.layer == "raw":
            return Raw(shape, spec, name="layer")(*inputs)
        common = {"use_bias": False, "padding": options.get("padding", "SAME"), "name": "layer"}
        if spec.layer == "conv_transpose":
            flipped = options.get("transpose_kernel", False)
            features = shape[-2] if flipped else shape[-1]
            layer = nn.ConvTranspose(features, shape[:-2], options["strides"], transpose_kernel=flipped, **common)
            return layer(*inputs)
        strides, dilation = options.get("strides", 1), options.get("dilation", 1)
        groups = options.get("groups", 1)
        return nn.Conv(shape[-1], shape[:-2], strides, kernel_dilation=dilation, feature_group_count=groups, **common)(
            *inputs
        )


def weights(spec: Spec, w: Any) -> dict[str, Any]:
    """The parameters of the model with this weight."""
    inner = {"table": {"embedding": w}} if spec.layer == "tied" else {NAMES.get(spec.layer, "kernel"): w}
    return {"layer": inner}


def with_weights(spec: Spec, w: Any, factors: Any) -> dict[str, Any]:
    """All parameters of the model: the weight, and what the library has added."""
    return merged(weights(spec, w), factors)


def merged(left: Any, right: Any) -> Any:
    """Two nested dictionaries as one."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        return right
    both = {key: merged(left[key], right[key]) for key in left.keys() & right.keys()}
    return {**left, **right, **both}


def added(params: Any, base: Any) -> Any:
    """What one nested dictionary has and the other has not."""
    out = {}
    for key, value in params.items():
        if key not in base:
            out[key] = value
        elif isinstance(value, dict) and (rest := added(value, base[key])):
            out[key] = rest
    return out
