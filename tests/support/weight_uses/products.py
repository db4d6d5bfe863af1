"""Products: the weight on either side, in any layout."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from tests.support.weight_uses.kind import Array, Params, bend, ids, kind


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


@kind({"w": (5, 7), "v": (7, 6)}, x=(3, 5))
def weights_multiplied(p: Params, x: Array) -> Array:
    return x @ (p["w"] @ p["v"])


@kind({"w": (5, 4), "v": (6, 5)}, rest={"u": (4, 5)}, x=(3, 5))
def weights_multiplied_and_transposed(p: Params, x: Array) -> Array:
    return x @ (p["v"] @ (p["w"] @ p["u"]).T).T


@kind({"w": (3, 5, 4), "v": (3, 2, 4, 6)}, x=(3, 7, 5))
def weights_multiplied_by_experts(p: Params, x: Array) -> Array:
    return jnp.einsum("ebi,ehio->ebho", x, jnp.einsum("eik,ehko->ehio", p["w"], p["v"]))


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
    return bend(x @ p["up"] + p["bias"][None]) @ p["down"]
