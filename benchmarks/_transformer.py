"""A decoder-only transformer in plain functions on plain dictionaries, its layers in a Python loop or in a scan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# The projections of one layer: the weights that LoRA adapts.
KERNELS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

Params = dict[str, Any]
# x (..., in), weight -> (..., out). The weight is an array, or what a model with factors holds in its place.
Product = Callable[[jax.Array, Any], jax.Array]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model.

    Arguments:
        layers: their number.
        width: of the residual stream.
        hidden: width of the MLP.
        heads: of the attention.
        vocabulary: tokens that there are.
        length: tokens of a sequence.
        biases: whether every kernel of a layer has a bias, `bq` for `wq`.
        gated: whether the MLP is a SwiGLU, `(silu(x w1) * (x w3)) w2`, and not `gelu(x w1) w2`.
    """

    layers: int = 4
    width: int = 512
    hidden: int = 2048
    heads: int = 8
    vocabulary: int = 8192
    length: int = 256
    biases: bool = False
    gated: bool = False


def init(key: jax.Array, sizes: Sizes) -> Params:
    """Parameters with a list of layers, kernels `(in, out)`."""
    d, h = sizes.width, sizes.hidden
    shapes = {"wq": (d, d), "wk": (d, d), "wv": (d, d), "wo": (d, d), "w1": (d, h), "w2": (h, d)}
    shapes |= {"w3": (d, h)} if sizes.gated else {}

    def normal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return jax.random.normal(key, shape) / jnp.sqrt(shape[0])

    def layer(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shapes))
        kernels = {name: normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
        biases = {bias_of(name): jnp.zeros(shape[1]) for name, shape in shapes.items()} if sizes.biases else {}
        return {"norm1": jnp.ones(d), "norm2": jnp.ones(d), **kernels, **biases}

    embed, position, head, *layers = jax.random.split(key, 3 + sizes.layers)
    return {
        "embed": jax.random.normal(embed, (sizes.vocabulary, d)),
        "position": 0.1 * jax.random.normal(position, (sizes.length, d)),
        "layers": [layer(k) for k in layers],
        "norm": jnp.ones(d),
        "head": normal(head, (d, sizes.vocabulary)),
    }


def bias_of(kernel: str) -> str:
    """The name of a kernel's bias."""
    return f"b{kernel[1:]}"


def stack(params: Params) -> Params:
    """The same parameters with the layers stacked in one array, `(layers, in, out)`, as `scanned` expects them."""
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def unrolled(params: Params, tokens: jax.Array, *, heads: int, product: Product = jnp.matmul) -> jax.Array:
    """Logits `(batch, length, vocabulary)` of tokens `(batch, length)`, the layers in a Python loop."""
    x = _embed(params, tokens)
    for layer in params["layers"]:
        x = _block(x, layer, heads, product)
    return _head(params, x)


def scanned(params: Params, tokens: jax.Array, *, heads: int, product: Product = jnp.matmul) -> jax.Array:
    """As `unrolled`, the layers in one `lax.scan` over stacked parameters."""

    def body(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return _block(x, layer, heads, product), None

    x, _ = jax.lax.scan(body, _embed(params, tokens), params["layers"])
    return _head(params, x)


def _embed(params: Params, tokens: jax.Array) -> jax.Array:
    return params["embed"][tokens] + params["position"][: tokens.shape[1]]


def _head(params: Params, x: jax.Array) -> jax.Array:
    return _norm(x, params["norm"]) @ params["head"]


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain


def _block(x: jax.Array, layer: Params, heads: int, product: Product) -> jax.Array:
    x = x + _attention(_norm(x, layer["norm1"]), layer, heads, product)
    y = _norm(x, layer["norm2"])
    hidden = _linear(y, layer, "w1", product)
    hidden = jax.nn.silu(hidden) * _linear(y, layer, "w3", product) if "w3" in layer else jax.nn.gelu(hidden)
    return x + _linear(hidden, layer, "w2", product)


def _linear(x: jax.Array, layer: Params, kernel: str, product: Product) -> jax.Array:
    y, bias = product(x, layer[kernel]), layer.get(bias_of(kernel))
    return y if bias is None else y + bias


def _attention(x: jax.Array, layer: Params, heads: int, product: Product) -> jax.Array:
    batch, length, width = x.shape
    q, k, v = (_linear(x, layer, name, product).reshape(batch, length, heads, -1) for name in ("wq", "wk", "wv"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(width // heads)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    return _linear(mixed.reshape(batch, length, width), layer, "wo", product)
