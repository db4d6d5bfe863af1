"""Every primitive that has a rule, by what the rule relies on, with a use of it for each that is linear in the weight.

A rule passes an update through a primitive, `op(base + update) = op(base) + op(update)`, only if that is so. Linear
primitives are shown to be so on numbers; an affine one has a constant, which belongs to the base alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.extend import treat_as
from tests.support import weight_uses

Array = jax.Array
Op = Callable[[Array], Array]  # of a matrix
WHOLE = PartitionSpec()

# Other names of a primitive, in other releases of JAX.
ALIASES = {
    "copy_p": "copy",
    "pcast": "pvary",
    "pjit": "jit",
    "core_call": "closed_call",
    "eval_jaxpr": "closed_call",
    "remat": "checkpoint",
    "remat2": "checkpoint",
}

# Those that no program of this release of JAX contains.
ABSENT = {"closed_call", "layout_constraint", "stop_gradient"}

IDENTITIES: dict[str, Op] = {
    "copy": lambda w: jnp.copy(w),
    "sharding_constraint": lambda w: lax.with_sharding_constraint(
        w, NamedSharding(weight_uses.mesh(), PartitionSpec())
    ),
    "name": lambda w: checkpoint_name(w, "w"),
    "pvary": lambda w: _on_devices(lambda w: _rows(w) @ lax.pcast(w, "model", to="varying"), w),
    "optimization_barrier": lax.optimization_barrier,
    "device_put": lambda w: jax.device_put(w, jax.memory.Space.Device),
    "reshard": lambda w: jax.sharding.reshard(w, PartitionSpec(None, "model")),
}

STRUCTURE: dict[str, Op] = {
    "transpose": lambda w: w.T,
    "squeeze": lambda w: lax.squeeze(w[None], (0,)),
    "reshape": lambda w: w.reshape(2, -1, w.shape[1]),
    "broadcast_in_dim": lambda w: jnp.broadcast_to(w, (3, *w.shape)),
    "tile": lambda w: jnp.tile(w, (1, 2)),
    "rev": lambda w: jnp.flip(w, 1),
    "all_gather": lambda w: _on_devices(
        lambda w: _rows(w, 2) @ lax.all_gather(w, "model", tiled=True), w, PartitionSpec("model")
    ),
    "slice": lambda w: w[1:, ::2],
    "split": lambda w: lax.split(w, (1, w.shape[0] - 1))[1],
    "dynamic_slice": lambda w: lax.dynamic_slice(w, (1, 0), (2, w.shape[1])),
    "gather": lambda w: jnp.take(w, jnp.array([3, 0, 3]), axis=0, mode="clip"),
    "stack": lambda w: jnp.stack([w, w]),
}

ARITHMETIC: dict[str, Op] = {
    "neg": lambda w: -w,
    "mul": lambda w: 3 * w * jnp.arange(1.0, w.shape[1] + 1)[None],
    "div": lambda w: w / jnp.arange(1.0, w.shape[1] + 1)[None],
}

AFFINE: dict[str, Op] = {
    "pad": lambda w: lax.pad(w, jnp.float32(0.5), ((1, 0, 0), (0, 2, 1))),
    "concatenate": lambda w: jnp.concatenate([w, jnp.ones_like(w)]),
    "add": lambda w: w + _constant(w.shape),
    "sub": lambda w: _constant(w.shape) - w,
}

CONSUMERS: dict[str, Op] = {
    "dot_general": lambda w: _rows(w) @ w,
    "conv_general_dilated": lambda w: lax.conv_general_dilated(
        _constant((1, w.shape[0], 3)), w.T[..., None], (1,), "SAME"
    ),
    "ragged_dot_general": lambda w: lax.ragged_dot(
        _constant((5, w.shape[0])), jnp.stack([w, 2 * w]), jnp.array([2, 3])
    ),
    "jlora_treat_as": lambda w: treat_as(jnp.matmul, lambda x, w: x @ w)(_rows(w), w),
}

# These hold a program. It is interpreted, so that an update passes if it passes through all of its equations.
INTERPRETED: dict[str, Op] = {
    "jit": jax.jit(lambda w: 2 * w.T),
    "checkpoint": jax.checkpoint(lambda w: 2 * w.T),
    "scan": lambda w: lax.scan(lambda w, _: (2 * w, None), w, length=2)[0],
    "while": lambda w: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, 2 * s[1]), (0, w))[1],
    "shard_map": lambda w: _on_devices(lambda w: _rows(w) @ w, w),
    "cond": lambda w: lax.cond(_rows(w).sum() > 0, lambda w: _rows(w) @ w, lambda w: -_rows(w) @ w, w),
}

# Linear up to rounding: below 16 bits base and update are rounded together, in the dense weight.
ROUNDING: dict[str, Op] = {
    "convert_element_type": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "reduce_precision": lambda w: lax.reduce_precision(w, 8, 7),
}

# These have rules of derivatives or batching that take arrays: the weight is materialised.
DENSE: dict[str, Op] = {
    "custom_jvp_call": lambda w: _with_a_jvp(w),
    "custom_vjp_call": lambda w: _with_a_vjp(w),
    "custom_vmap_call": lambda w: _with_batches(w),
}

CLASSES: dict[str, dict[str, Op]] = {
    "identity": IDENTITIES,
    "structure": STRUCTURE,
    "arithmetic": ARITHMETIC,
    "affine": AFFINE,
    "consumer": CONSUMERS,
    "interpreted": INTERPRETED,
    "rounding": ROUNDING,
    "dense": DENSE,
}

# Uses of those primitives that are not linear in the weight, each of which must be materialised.
NOT_LINEAR: dict[str, Op] = {
    "mul": lambda w: w * w,
    "div": lambda w: 1 / w,
    "convert_element_type": lambda w: w.astype(jnp.float8_e4m3fn).astype(jnp.float32),
    "convert_element_type to integers": lambda w: (4 * w).astype(jnp.int8).astype(jnp.float32),
    "reduce_precision": lambda w: lax.reduce_precision(w, 4, 3),
    "scan": lambda w: lax.scan(lambda w, _: (w * w, None), w, length=2)[0],
}


def _constant(shape: tuple[int, ...]) -> Array:
    return jnp.asarray(np.random.default_rng(11).uniform(0.5, 1.5, shape), jnp.float32)


def _rows(w: Array, shards: int = 1) -> Array:
    """What multiplies a weight, of which this device has one of some shards."""
    return _constant((2, shards * w.shape[0]))


def surroundings(name: str) -> contextlib.AbstractContextManager[Any]:
    """What the use of a primitive needs around it: a mesh of Explicit axes, or nothing."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    return jax.set_mesh(mesh) if name == "reshard" else contextlib.nullcontext()


def _on_devices(fun: Op, w: Array, spec: PartitionSpec = WHOLE) -> Array:
    """Every device along "model" gives a part of the result."""
    return jax.shard_map(fun, mesh=weight_uses.mesh(), in_specs=(spec,), out_specs=PartitionSpec("model"))(w)


@jax.custom_jvp
def _with_a_jvp(w: Array) -> Array:
    return w.T


_with_a_jvp.defjvp(lambda primals, tangents: (_with_a_jvp(*primals), tangents[0].T))


@jax.custom_vjp
def _with_a_vjp(w: Array) -> Array:
    return w.T


_with_a_vjp.defvjp(lambda w: (_with_a_vjp(w), None), lambda _, dy: (dy.T,))


@custom_vmap
def _with_batches(w: Array) -> Array:
    return w.T


@_with_batches.def_vmap
def _(size: int, batched: list[bool], w: Array) -> tuple[Array, bool]:
    return w.mT, True
