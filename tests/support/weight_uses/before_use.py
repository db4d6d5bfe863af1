"""What programs do to a weight before they use it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from tests.support.weight_uses.kind import Array, Params, kind, mesh


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
