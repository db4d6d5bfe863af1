"""Kinds of weight: how programs hold and use their weights, one small function a kind.

A kind is what a library's layer comes down to. `use(params, x)` is pure, in any floating-point dtype, and says nothing
of jit, loops or batching: that is what `programs.py` puts around it. Sizes are tiny, and differ wherever they can.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array
Params = dict[str, Array]
Inputs = dict[str, Array]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way to hold and use weights.

    Arguments:
        name: the function's name.
        weights: the shapes of the weights that the adapter updates.
        rest: the shapes of parameters that have no low-rank form, and stay as they are.
        inputs: the shapes of floating-point inputs, and the values of whole-number ones.
        use: `use(params, inputs) -> y`.
        coarse: whether the program itself casts to bfloat16, so that float32 inputs do not make it exact.
        formed: whether the use has no factored form.
        still: whether no gradient reaches the weight.
        limited: whether JAX can neither batch what consumes the weight nor differentiate it twice.
    """

    name: str
    weights: dict[str, Shape]
    rest: dict[str, Shape]
    inputs: dict[str, Shape | np.ndarray]
    use: Callable[[Params, Inputs], Array]
    coarse: bool = False
    formed: bool = False
    still: bool = False
    limited: bool = False

    def values(self, rng: np.random.Generator, copies: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Random float32 parameters (`copies` of each, stacked, where that is not zero) and inputs."""
        lead = (copies,) if copies else ()

        def normal(shape: Shape) -> np.ndarray:
            return np.asarray(0.6 * rng.normal(size=shape), np.float32)

        params = {name: normal((*lead, *shape)) for name, shape in (self.weights | self.rest).items()}
        inputs = {name: v if isinstance(v, np.ndarray) else normal(v) for name, v in self.inputs.items()}
        return params, inputs


KINDS: list[Kind] = []


def kind(
    weights: Shape | Mapping[str, Shape],
    *,
    rest: Mapping[str, Shape] | None = None,
    flags: str = "",
    **inputs: Shape | np.ndarray,
) -> Callable[[Callable[..., Array]], None]:
    """Registers `fn(params, **inputs)`; weights given as one shape are the single weight `w`."""

    def register(fn: Callable[..., Array]) -> None:
        shapes = dict(weights) if isinstance(weights, Mapping) else {"w": weights}

        def use(params: Params, values: Inputs) -> Array:
            return fn(params, **values)

        marks = dict.fromkeys(flags.split(), True)
        KINDS.append(Kind(fn.__name__, shapes, dict(rest or {}), inputs, use, **marks))

    return register


def ids(*numbers: Any) -> np.ndarray:
    return np.array(numbers, np.int32)


# Products: the weight on either side, in any layout.


@kind((5, 6), rest={"bias": (6,)}, x=(4, 5))
def kernel(p: Params, x: Array) -> Array:
    return x @ p["w"] + p["bias"][None]


@kind((6, 5), x=(2, 3, 5))
def kernel_out_in(p: Params, x: Array) -> Array:
    return x @ p["w"].T


@kind((6, 5), rest={"bias": (6,)}, x=(5,))
def kernel_on_the_left(p: Params, x: Array) -> Array:
    return p["w"] @ x + p["bias"]


@kind((5, 6), x=(4, 5))
def einsum_transposed(p: Params, x: Array) -> Array:
    return jnp.einsum("io,bi->ob", p["w"], x, precision=lax.Precision.HIGHEST)


@kind((5, 2, 3), x=(4, 5))
def dense_general_out_axes(p: Params, x: Array) -> Array:
    return jnp.einsum("bd,dhk->bhk", x, p["w"])


@kind((2, 3, 5), x=(4, 2, 3))
def dense_general_in_axes(p: Params, x: Array) -> Array:
    return jnp.einsum("bhk,hkd->bd", x, p["w"])


@kind((3, 5, 2), x=(2, 4, 3))
def in_axes_apart(p: Params, x: Array) -> Array:
    return jnp.einsum("hbk,kdh->bd", x, p["w"])


@kind((4, 5, 6), x=(4, 5))
def batch_axis(p: Params, x: Array) -> Array:
    return lax.dot_general(x, p["w"], (((1,), (1,)), ((0,), (0,))))


@kind((3, 5, 6), x=(3, 4, 5))
def experts(p: Params, x: Array) -> Array:
    return jnp.einsum("ebi,eio->ebo", x, p["w"])


@kind((5, 3, 6), x=(4, 5))
def experts_of_one_input(p: Params, x: Array) -> Array:
    return jnp.einsum("bi,ieo->beo", x, p["w"])


@kind((2, 3, 5, 4), x=(2, 4, 5))
def gemma_fused_kv(p: Params, x: Array) -> Array:
    return jnp.einsum("bsd,ckdh->cbskh", x, p["w"])


@kind((3, 5, 6), flags="limited", x=(7, 5), sizes=ids(2, 0, 5))
def ragged_experts(p: Params, x: Array, sizes: Array) -> Array:
    return lax.ragged_dot(x, p["w"], sizes)


@kind((3, 5, 5), x=(4, 5))
def scan_stacked(p: Params, x: Array) -> Array:
    return lax.scan(lambda h, w: (x + 0.1 * (h @ w), None), x, p["w"])[0]


@kind((3, 5, 5), x=(4, 5))
def layers_by_index(p: Params, x: Array) -> Array:
    return lax.fori_loop(0, 3, lambda k, h: x + 0.1 * (h @ p["w"][k]), x)


@kind({"up": (5, 7), "down": (7, 4)}, rest={"bias": (7,)}, x=(3, 5))
def mlp(p: Params, x: Array) -> Array:
    return _bend(x @ p["up"] + p["bias"][None]) @ p["down"]


def _bend(y: Array) -> Array:
    """A nonlinearity that compiles in no time."""
    return y * y


# Lookups. JAX defines indices out of bounds in the modes fill, clip and wrap; elsewhere they are a broken promise.

ROWS = ids([0, 3, 3], [6, 1, -2])  # from the end, too
STRAY = ids([0, -1, 3], [9, -9, 6])  # on both sides of a table of seven or eight rows


@kind((8, 4), x=(2, 3, 4), rows=STRAY)
def take_fill(p: Params, x: Array, rows: Array) -> Array:
    return jnp.take(p["w"], rows, axis=0) * x  # not-a-number in the rows out of bounds


@kind((8, 4), x=(2, 3, 4), rows=STRAY)
def take_clip(p: Params, x: Array, rows: Array) -> Array:
    return jnp.take(p["w"], rows, axis=0, mode="clip") * x


@kind((7, 4), x=(2, 3, 4), rows=STRAY)
def take_wrap(p: Params, x: Array, rows: Array) -> Array:
    return jnp.take(p["w"], rows, axis=0, mode="wrap") * x


@kind((4, 7), x=(4, 2, 3), rows=STRAY)
def take_columns(p: Params, x: Array, rows: Array) -> Array:
    return p["w"].at[:, rows].get(mode="fill", fill_value=2.5) * x


@kind((8, 4), x=(2, 3, 4), rows=ROWS)
def index(p: Params, x: Array, rows: Array) -> Array:
    return p["w"][rows] * x


@kind((7, 4), x=(4,), row=ids(5))
def index_of_one_row(p: Params, x: Array, row: Array) -> Array:
    return p["w"].at[row[0]].get(mode="promise_in_bounds") * x


@kind((7, 2, 3), x=(3, 2, 3), rows=ids(1, 6, 6))
def index_of_heads(p: Params, x: Array, rows: Array) -> Array:
    return p["w"][rows] * x


@kind((3, 5, 4), x=(2, 4), rows=ids(1, 2), places=ids(4, 0))
def index_by_two_numbers(p: Params, x: Array, rows: Array, places: Array) -> Array:
    return p["w"][rows, places] * x


@kind((3, 7, 4), x=(3, 2, 4), rows=ids([1, 6], [0, 0], [5, 2]))
def index_in_each_table(p: Params, x: Array, rows: Array) -> Array:
    return jax.vmap(lambda table, r: table[r])(p["w"], rows) * x


@kind((7, 4), x=(4,), row=ids(6))
def dynamic_slice_of_a_row(p: Params, x: Array, row: Array) -> Array:
    return lax.dynamic_slice(p["w"], (row[0], 0), (1, 4))[0] * x


@kind((7, 4), x=(2, 4), row=ids(6))
def dynamic_slice_of_rows(p: Params, x: Array, row: Array) -> Array:
    return x @ lax.dynamic_slice(p["w"], (row[0], 0), (3, 4)).T  # the start is clamped to 4


@kind((7, 4), x=(2, 3, 4), rows=ROWS)
def tied_embedding(p: Params, x: Array, rows: Array) -> Array:
    return _bend(p["w"][rows] + x) @ p["w"].T


# Convolutions: rank, stride, dilation, grouping and layout.

_NHWC = ("NHWC", "HWIO", "NHWC")


def _conv(x: Array, w: Array, layout: tuple[str, str, str], **options: Any) -> Array:
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)


@kind((5, 3, 3), x=(2, 3, 8))
def conv_1d(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NCW", "OIW", "NCW"), window_strides=(2,), rhs_dilation=(2,), padding="VALID")


@kind((2, 3, 3, 6), x=(2, 4, 5, 3))
def conv_2d(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], _NHWC, window_strides=(2, 1), padding=((1, 0), (2, 1)))


@kind((3, 2, 6, 3), x=(4, 5, 2, 3))
def conv_2d_of_a_dilated_input(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("HWNC", "IHOW", "CNHW"), lhs_dilation=(2, 1), padding=((1, 1), (0, 2)))


@kind((2, 4, 6), x=(2, 5, 4))
def conv_of_composite_channels(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NWC", "WIO", "NWC"))


@kind((2, 3, 2, 3, 4), x=(1, 5, 4, 3, 3))
def conv_3d(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NDHWC", "DHWIO", "NDHWC"), window_strides=(1, 2, 1))


@kind((2, 3, 2, 6), x=(2, 4, 5, 4))
def conv_grouped(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], _NHWC, feature_group_count=2)


@kind((2, 3, 1, 3), x=(2, 4, 5, 3))
def conv_depthwise(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], _NHWC, feature_group_count=3)


@kind((6, 1, 4), x=(2, 3, 7))
def conv_depthwise_wide(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NCW", "OIW", "NCW"), feature_group_count=3, window_strides=(2,))


@kind((2, 3, 3, 6), x=(2, 3, 4, 3))
def conv_transpose(p: Params, x: Array) -> Array:
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=_NHWC)


@kind((2, 3, 6, 3), x=(2, 3, 4, 3))
def conv_transpose_kernel(p: Params, x: Array) -> Array:
    return lax.conv_transpose(x, p["w"], (2, 1), "VALID", dimension_numbers=_NHWC, transpose_kernel=True)


# What programs do to a weight before they use it.


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Eight devices, which the tests simulate; the compiler is free to lay out whatever is not said."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@kind((5, 6), x=(4, 5))
def marked(p: Params, x: Array) -> Array:
    """Copied, named, behind a barrier, laid out."""
    around = jax.sharding.get_abstract_mesh()
    w = lax.optimization_barrier(checkpoint_name(jnp.copy(p["w"]), "w"))
    return x @ lax.with_sharding_constraint(w, NamedSharding(mesh() if around.empty else around, PartitionSpec()))


@kind((5, 6), flags="still", x=(4, 5))
def without_gradient(p: Params, x: Array) -> Array:
    return x @ lax.stop_gradient(p["w"])


@kind((5, 6), x=(4, 5))
def cast_up(p: Params, x: Array) -> Array:
    return x.astype(jnp.float32) @ p["w"].astype(jnp.float32)


@kind((5, 6), flags="coarse", x=(4, 5))
def cast_down(p: Params, x: Array) -> Array:
    return x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)


@kind((2, 5, 3), x=(4, 5))
def axes_joined(p: Params, x: Array) -> Array:
    return x @ jnp.moveaxis(p["w"], 0, 1).reshape(5, 6)


@kind((6, 10), x=(4, 2, 3))
def axes_split(p: Params, x: Array) -> Array:
    return jnp.einsum("bhk,hkde->bde", x, p["w"].reshape(2, 3, 5, 2))


@kind((10, 3), x=(4, 5))
def axes_regrouped(p: Params, x: Array) -> Array:
    return x @ p["w"].reshape(5, 2, 3).reshape(-1).reshape(5, 6)


@kind((1, 5, 6), x=(4, 5))
def axes_of_one(p: Params, x: Array) -> Array:
    return x @ jnp.expand_dims(p["w"].squeeze(0), (0, 2))[0, :, 0]


@kind((5, 6), x=(3, 4, 5))
def broadcast(p: Params, x: Array) -> Array:
    return x @ jnp.broadcast_to(p["w"], (3, 5, 6))


@kind((5, 3), x=(4, 5))
def tiled(p: Params, x: Array) -> Array:
    return x @ jnp.tile(p["w"], (1, 2))


@kind((9, 13), x=(4, 5))
def sliced(p: Params, x: Array) -> Array:
    """With a stride and without, and reversed along both axes."""
    return x @ jnp.flip(p["w"][:, 1:7][::-2])[:, :3]


@kind((5, 12), x=(3, 5))
def split(p: Params, x: Array) -> Array:
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return (x @ q) * (x @ k) + x @ v


@kind((4, 5), x=(5, 6))
def padded_and_rolled(p: Params, x: Array) -> Array:
    return x @ jnp.roll(jnp.pad(p["w"], ((1, 1), (0, 2))), 3, axis=0)


@kind((5, 6), rest={"scale": ()}, x=(4, 5))
def scaled(p: Params, x: Array) -> Array:
    """By parameters, numbers and a sign."""
    return x @ (-p["scale"] * (2 * p["w"]) / (1 + p["scale"] * p["scale"]))


@kind((5, 6), rest={"rows": (5,), "columns": (6,)}, x=(4, 5))
def scaled_by_vectors(p: Params, x: Array) -> Array:
    return x @ (p["rows"][:, None] * p["w"] * p["columns"][None])


@kind({"u": (5, 3), "v": (5, 4)}, rest={"frozen": (5, 2)}, x=(6, 5))
def concatenated(p: Params, x: Array) -> Array:
    return x @ jnp.concatenate([p["u"], p["frozen"], p["v"]], axis=1)


@kind({"u": (5, 6), "v": (5, 6)}, x=(4, 5))
def stacked(p: Params, x: Array) -> Array:
    return jnp.einsum("bi,nio->bno", x, jnp.stack([p["u"], p["v"]]))


@kind({"u": (5, 6), "v": (5, 6)}, rest={"share": ()}, x=(4, 5))
def interpolated(p: Params, x: Array) -> Array:
    return x @ (p["u"] + p["share"] * (p["v"] - p["u"]))


@kind((5, 6), rest={"frozen": (5, 6)}, x=(4, 5))
def added_to_a_frozen_kernel(p: Params, x: Array) -> Array:
    return x @ (p["w"] + p["frozen"])
