"""Each kind of weight, written with layers: the same mathematics, in the words that a library of layers has.

A form is `form(call, p, factors, **inputs) -> y`, in which `call(name, spec, w, *inputs)` is a layer on the weight `w`.
Where a layer is applied several times, on slices of a stack, the form hands over the slices of its factors. A kind
without a form is a module that holds the weight itself and uses it as the catalogue does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.weight_uses import KINDS, Kind, bend

Tree = Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """A kind of layer.

    Arguments:
        layer: dense, einsum, conv, conv_transpose, embed, tied (an embedding that is the output's kernel too), or raw.
        equation: of an einsum of inputs and weight.
        order: the axes of the program's weight in the order in which the layer holds them; empty if they are the same.
        options: of a convolution: strides, padding, dilation, groups, transpose_kernel.
        use: of a raw weight, `use(params, inputs)`.
    """

    layer: str
    equation: str = ""
    order: tuple[int, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use: Callable[..., jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """How a kind is written with layers, and how many layers a stacked weight is divided into (zero: not divided)."""

    run: Callable[..., jax.Array]
    stack: int = 0


DENSE, DENSE_OF_ROWS = Spec("dense"), Spec("dense", order=(1, 0))
EMBED, TIED = Spec("embed"), Spec("tied")


def einsum(equation: str) -> Form:
    spec = Spec("einsum", equation)
    return Form(lambda call, p, a, x: call("w", spec, p["w"], x))


def conv(order: tuple[int, ...] = (), to: tuple[int, ...] = (), layer: str = "conv", **options: Any) -> Form:
    """A convolution; `to` moves the axes of inputs to (batch, places, channels), and its inverse those of outputs."""
    spec = Spec(layer, order=order, options=options)

    def run(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
        y = call("w", spec, p["w"], x.transpose(to) if to else x)
        return y.transpose([to.index(k) for k in range(y.ndim)]) if to else y

    return Form(run)


def _scan_stacked(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, layer: Any) -> Any:
        return x + 0.1 * call("w", DENSE, layer[0], h, factors=layer[1]), None

    return lax.scan(body, x, (p["w"], a.get("w", {})))[0]


def _axes_of_one(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    w, factors = jax.tree.map(lambda leaf: leaf[0], (p["w"], a.get("w", {})))
    return call("w", DENSE, w, x, factors=factors)


def _layers_by_index(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    def body(k: Any, h: jax.Array) -> jax.Array:
        w, factors = jax.tree.map(lambda leaf: leaf[k], (p["w"], a.get("w", {})))
        return x + 0.1 * call("w", DENSE, w, h, factors=factors)

    return lax.fori_loop(0, 3, body, x)


def _index_in_each_table(call: Any, p: Tree, a: Tree, x: jax.Array, rows: jax.Array) -> jax.Array:
    def one(w: jax.Array, factors: Tree, r: jax.Array) -> jax.Array:
        return call("w", EMBED, w, r, factors=factors)

    return jax.vmap(one)(p["w"], a.get("w", {}), rows) * x


def _split(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(call("w", DENSE, p["w"], x), 3, axis=1)
    return q * k + v


def _concatenated(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    parts = [call("u", DENSE, p["u"], x), x @ p["frozen"], call("v", DENSE, p["v"], x)]
    return jnp.concatenate(parts, axis=1)


def _interpolated(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    u, v = (call(name, DENSE, p[name], x) for name in ("u", "v"))
    return u + p["share"] * (v - u)


def _mlp(call: Any, p: Tree, a: Tree, x: jax.Array) -> jax.Array:
    return call("down", DENSE, p["down"], bend(call("up", DENSE, p["up"], x) + p["bias"][None]))


def _cast(dtype: Any) -> Form:
    return Form(lambda call, p, a, x: call("w", DENSE, p["w"], x.astype(dtype)).astype(dtype))


def dense(before: Callable[..., Any] = lambda x, p: x, after: Callable[..., Any] = lambda y, p: y) -> Form:
    """A dense layer, with what stands before and after it."""
    return Form(lambda call, p, a, x: after(call("w", DENSE, p["w"], before(x, p)), p))


def rows_of(find: Callable[..., Any], spec: Spec = EMBED) -> Form:
    """An embedding of the rows that `find` computes from the inputs, times the other input."""
    return Form(lambda call, p, a, x, **ids: call("w", spec, p["w"], find(**ids)) * x)


FORMS: dict[str, Form] = {
    "kernel": dense(after=lambda y, p: y + p["bias"]),
    "kernel_out_in": Form(lambda call, p, a, x: call("w", DENSE_OF_ROWS, p["w"], x)),
    "kernel_on_the_left": Form(lambda call, p, a, x: call("w", DENSE_OF_ROWS, p["w"], x[None])[0] + p["bias"]),
    "einsum_transposed": dense(after=lambda y, p: y.T),
    "dense_general_out_axes": einsum("bd,dhk->bhk"),
    "dense_general_in_axes": einsum("bhk,hkd->bd"),
    "in_axes_apart": Form(lambda call, p, a, x: call("w", Spec("einsum", "bhk,kdh->bd"), p["w"], x.transpose(1, 0, 2))),
    "batch_axis": einsum("bi,bio->bo"),
    "experts": einsum("ebi,eio->ebo"),
    "experts_of_one_input": einsum("bi,ieo->beo"),
    "gemma_fused_kv": einsum("bsd,ckdh->cbskh"),
    "weights_multiplied": Form(lambda call, p, a, x: call("v", DENSE, p["v"], call("w", DENSE, p["w"], x))),
    "weights_multiplied_and_transposed": Form(
        lambda call, p, a, x: call("v", DENSE_OF_ROWS, p["v"], call("w", DENSE, p["w"], x) @ p["u"])
    ),
    "weights_multiplied_by_experts": Form(
        lambda call, p, a, x: call(
            "v", Spec("einsum", "ebk,ehko->ebho"), p["v"], call("w", Spec("einsum", "ebi,eik->ebk"), p["w"], x)
        )
    ),
    "scan_stacked": Form(_scan_stacked, stack=3),
    "layers_by_index": Form(_layers_by_index, stack=3),
    "mlp": Form(_mlp),
    "marked": dense(),
    "cast_up": _cast(jnp.float32),
    "cast_down": _cast(jnp.bfloat16),
    "axes_joined": Form(
        lambda call, p, a, x: call("w", Spec("einsum", "bi,nio->bno"), p["w"], x).reshape(x.shape[0], -1)
    ),
    "axes_split": dense(lambda x, p: x.reshape(4, 6), lambda y, p: y.reshape(4, 5, 2)),
    "axes_of_one": Form(_axes_of_one, stack=1),
    "broadcast": dense(),
    "tiled": dense(after=lambda y, p: jnp.tile(y, (1, 2))),
    "split": Form(_split),
    "scaled": dense(after=lambda y, p: y * (-p["scale"] * 2 / (1 + p["scale"] * p["scale"]))),
    "scaled_by_vectors": dense(lambda x, p: x * p["rows"], lambda y, p: y * p["columns"]),
    "concatenated": Form(_concatenated),
    "stacked": Form(lambda call, p, a, x: jnp.stack([call(name, DENSE, p[name], x) for name in ("u", "v")], axis=1)),
    "interpolated": Form(_interpolated),
    "added_to_a_frozen_kernel": Form(lambda call, p, a, x: call("w", DENSE, p["w"], x) + x @ p["frozen"]),
    "conv_1d": conv((2, 1, 0), (0, 2, 1), strides=(2,), padding="VALID", dilation=(2,)),
    "conv_2d": conv(strides=(2, 1), padding=((1, 0), (2, 1))),
    "conv_of_composite_channels": conv(),
    "conv_3d": conv(strides=(1, 2, 1)),
    "conv_grouped": conv(groups=2),
    "conv_depthwise": conv(groups=3),
    "conv_depthwise_wide": conv((2, 1, 0), (0, 2, 1), groups=3, strides=(2,)),
    "conv_transpose": conv(layer="conv_transpose", strides=(2, 2)),
    "conv_transpose_kernel": conv(layer="conv_transpose", strides=(2, 1), padding="VALID", transpose_kernel=True),
    "take_fill": rows_of(lambda rows: rows),
    "take_clip": rows_of(lambda rows: jnp.clip(rows, 0, 7)),
    "take_wrap": rows_of(lambda rows: rows % 7),
    "index": rows_of(lambda rows: rows % 8),
    "index_of_one_row": rows_of(lambda row: row[0]),
    "index_in_each_table": Form(_index_in_each_table, stack=3),
    "dynamic_slice_of_a_row": rows_of(lambda row: row[0]),
    "dynamic_slice_of_rows": Form(lambda call, p, a, x, row: x @ call("w", EMBED, p["w"], 4 + jnp.arange(3)).T),
    "tied_embedding": Form(lambda call, p, a, x, rows: call("w", TIED, p["w"], rows % 7, x)),
}


def form_of(kind: Kind) -> Form:
    """The form of a kind; for a kind without a form a module that holds the weights itself."""
    if kind.name in FORMS:
        return FORMS[kind.name]

    def run(call: Any, p: Tree, a: Tree, **inputs: jax.Array) -> jax.Array:
        rest = {name: p[name] for name in kind.rest}
        return call("w", Spec("raw", use=kind.use), p["w"], {"rest": rest, "inputs": inputs})

    return Form(run)


def plain(spec: Spec, w: jax.Array, *inputs: Any) -> jax.Array:
    """What a layer computes, without a library; `w` is in the layer's order."""
    if spec.layer == "dense":
        return inputs[0].astype(w.dtype) @ w  # the wider of both, as layers do
    if spec.layer == "einsum":
        return jnp.einsum(spec.equation, inputs[0], w)
    if spec.layer == "embed":
        return jnp.take(w, inputs[0], axis=0)
    if spec.layer == "tied":
        return bend(jnp.take(w, inputs[0], axis=0) + inputs[1]) @ w.T
    if spec.layer == "raw":
        assert spec.use is not None
        return spec.use({"w": w, **inputs[0]["rest"]}, inputs[0]["inputs"])
    return _plain_conv(spec, w, inputs[0])


def _plain_conv(spec: Spec, w: jax.Array, x: jax.Array) -> jax.Array:
    places = "DHW"[3 - (w.ndim - 2) :]
    numbers = (f"N{places}C", f"{places}IO", f"N{places}C")
    strides, padding = spec.options.get("strides", (1,) * len(places)), spec.options.get("padding", "SAME")
    if spec.layer == "conv_transpose":
        flipped = spec.options.get("transpose_kernel", False)
        return lax.conv_transpose(x, w, strides, padding, dimension_numbers=numbers, transpose_kernel=flipped)
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        rhs_dilation=spec.options.get("dilation"),
        dimension_numbers=numbers,
        feature_group_count=spec.options.get("groups", 1),
    )


assert set(FORMS) <= {kind.name for kind in KINDS}
