"""A decoder of the sizes of Llama 3 and GPT-3: abstract parameters on a mesh, and a loss with the layers in a scan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jlora.quantized import NF4

Params = dict[str, Any]
# x (..., in), weight -> (..., out). The weight is an array, or what a model with factors holds in its place.
Product = Callable[[jax.Array, Any], jax.Array]

# Parameters are sharded over `data` (FSDP), and over `model` along heads, hidden units and vocabulary; they are
# replicated over `replica`. The residual stream is sharded along sequences over `replica` and `data`, and between
# blocks along tokens over `model`.
AXES = ("replica", "data", "model")
BATCH = ("replica", "data")
COLUMN, ROW = PartitionSpec(None, "data", "model"), PartitionSpec(None, "model", "data")
# For GPUs: XLA gathers there along the major axis alone. With `ROW` it copies the stack of all layers, transposed.
ROW_MAJOR = PartitionSpec(None, ("model", "data"), None)
STREAM, BATCHED, HEADS = PartitionSpec(BATCH, "model"), PartitionSpec(BATCH), PartitionSpec(BATCH, None, "model")
HEAD = PartitionSpec("data", "model")
QUERY_PARTS = PartitionSpec(None, BATCH, None, "model")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder; attention computes the scores of `queries` tokens at a time.

    Llama 3 by arXiv:2407.21783, table 3; GPT-3 by arXiv:2005.14165, table 2.1.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256
    gated: bool = True  # SwiGLU and rotary positions; otherwise GELU and learned ones
    length: int = 4096
    queries: int = 1024

    @property
    def head(self) -> int:
        return self.width // self.heads


SIZES = {
    "Llama 3 8B": Sizes(32, 4096, 14336, 32, 8),
    "Llama 3 70B": Sizes(80, 8192, 28672, 64, 8),
    "Llama 3 405B": Sizes(126, 16384, 53248, 128, 8),
    # 50257 entries padded to a multiple of 128; the head is tied to the embedding.
    "GPT-3 175B": Sizes(96, 12288, 49152, 96, 96, vocabulary=50304, gated=False, length=2048),
}


def kernels(sizes: Sizes, row: PartitionSpec = ROW) -> dict[str, tuple[tuple[int, int, int], PartitionSpec]]:
    """Shape `(layers, in, out)` and partition of every kernel of the layers; `row` of those with a sharded input."""
    n, d, h, kv = sizes.layers, sizes.width, sizes.hidden, sizes.kv_heads * sizes.head
    out = {
        "wq": ((n, d, d), COLUMN),
        "wk": ((n, d, kv), COLUMN),
        "wv": ((n, d, kv), COLUMN),
        "wo": ((n, d, d), row),
        "up": ((n, d, h), COLUMN),
        "down": ((n, h, d), row),
    }
    return out | ({"gate": ((n, d, h), COLUMN)} if sizes.gated else {})


def array(mesh: AbstractMesh | Mesh, shape: tuple[int, ...], spec: PartitionSpec, dtype: Any = jnp.bfloat16) -> Any:
    """An abstract array on a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def nf4(mesh: AbstractMesh | Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> NF4:
    """An abstract kernel in 4-bit NormalFloat: codes, 8-bit scales and their scales, sharded as the kernel is."""
    *stack, rows, columns = shape
    groups = columns // 256
    columns_axis = spec[-1] if spec[-1] and groups % mesh.shape[spec[-1]] == 0 else None
    unit = array(mesh, (*stack, rows // 64, groups), PartitionSpec(*spec[:-1], columns_axis), jnp.float32)
    codes = array(mesh, (*stack, rows // 2, columns), spec, jnp.uint8)
    scale = array(mesh, (*stack, rows // 64, columns), spec, jnp.int8)
    return NF4(codes, scale, unit, unit, axis=-2, dtype=jnp.dtype(jnp.bfloat16))


BASES: dict[str, Callable[..., Any]] = {"bf16": array, "nf4": nf4}


def params(
    sizes: Sizes, mesh: AbstractMesh | Mesh, kernel: Callable[..., Any] = array, row: PartitionSpec = ROW
) -> Params:
    """Abstract parameters in bfloat16; `kernel` makes the kernels of the layers, `row` is as in `kernels`."""
    n, d, v = sizes.layers, sizes.width, sizes.vocabulary
    replicated = PartitionSpec()
    norms = {name: array(mesh, (n, d), replicated) for name in ("norm1", "norm2")}
    layers = {name: kernel(mesh, shape, spec) for name, (shape, spec) in kernels(sizes, row).items()}
    out = {
        "embed": array(mesh, (v, d), PartitionSpec("model", "data")),
        "layers": norms | layers,
        "norm": array(mesh, (d,), replicated),
    }
    if sizes.gated:
        return out | {"head": array(mesh, (d, v), HEAD)}
    return out | {"positions": array(mesh, (sizes.length, d), PartitionSpec(None, "data"))}


def loss(sizes: Sizes, product: Product = jnp.matmul) -> Callable[..., jax.Array]:
    """The mean negative log-likelihood `(params, tokens (batch, length), start (width,) = 0) -> scalar`.

    `start` is added to the embedded tokens: its gradient passes through every layer.
    """

    def run(params: Params, tokens: jax.Array, start: jax.Array | None = None) -> jax.Array:
        x = _lookup(params["embed"], tokens)
        x = x if sizes.gated else x + params["positions"]
        x = x if start is None else x + start

        @jax.checkpoint
        def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
            x = _constrain(STREAM, x)
            x = x + _constrain(STREAM, _attention(_constrain(BATCHED, _norm(x, layer["norm1"])), layer, sizes, product))
            x = x + _mlp(_constrain(BATCHED, _norm(x, layer["norm2"])), layer, product)
            return _constrain(STREAM, x), None

        x, _ = jax.lax.scan(block, x, params["layers"])
        x = _constrain(BATCHED, _norm(x, params["norm"]))
        logits = x @ (params["head"] if sizes.gated else _constrain(HEAD, params["embed"].T))
        logits = _constrain(HEADS, logits).astype(jnp.float32)
        # The target's logit is selected by comparison: indexing a sharded vocabulary would gather it.
        vocabulary = jnp.arange(sizes.vocabulary)
        picked = jnp.where(vocabulary == jnp.roll(tokens, -1, axis=1)[..., None], logits, 0.0).sum(axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    return run


def _lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Looks up rows of a table with a sharded vocabulary: each device adds its rows to the stream.

    With many replicas XLA would otherwise gather the table.
    """

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = tokens - jax.lax.axis_index("model") * len(table)
        is_local = (rows >= 0) & (rows < len(table))
        local_rows = table[jnp.clip(rows, 0, len(table) - 1)]
        local_rows = jnp.where(is_local[..., None], local_rows, jnp.zeros((), table.dtype))
        return jax.lax.psum_scatter(local_rows, "model", scatter_dimension=1, tiled=True)

    return jax.shard_map(local, in_specs=(PartitionSpec("model"), BATCHED), out_specs=STREAM)(table, tokens)


def _constrain(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * gain


def _mlp(x: jax.Array, layer: Params, product: Product) -> jax.Array:
    up = _constrain(HEADS, product(x, layer["up"]))
    hidden = jax.nn.silu(_constrain(HEADS, product(x, layer["gate"]))) * up if "gate" in layer else jax.nn.gelu(up)
    return product(hidden, layer["down"])


def _attention(x: jax.Array, layer: Params, sizes: Sizes, product: Product) -> jax.Array:
    batch, length, _ = x.shape
    q, k, v = (
        _constrain(HEADS, product(x, layer[name]).reshape(batch, length, -1, sizes.head)) for name in ("wq", "wk", "wv")
    )
    if sizes.gated:
        q, k = _rotate(q), _rotate(k)
    parts = length // sizes.queries
    q = q.reshape(batch, parts, sizes.queries, sizes.kv_heads, -1, sizes.head)
    q = _constrain(QUERY_PARTS, q.swapaxes(0, 1))

    @jax.checkpoint
    def part(q: jax.Array, first: jax.Array) -> jax.Array:
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) / sizes.head**0.5
        causal = jnp.arange(length) <= first + jnp.arange(sizes.queries)[:, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30)).astype(v.dtype)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v)

    mixed = _constrain(QUERY_PARTS, jax.lax.map(lambda args: part(*args), (q, sizes.queries * jnp.arange(parts))))
    return product(_constrain(HEADS, mixed.swapaxes(0, 1).reshape(batch, length, -1)), layer["wo"])


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (arXiv:2104.09864) on `(batch, length, heads, head)`."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 500000.0 ** (-jnp.arange(half) / half)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)
