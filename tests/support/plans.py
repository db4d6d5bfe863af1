"""A function to plan, and abstract arrays on a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

P = PartitionSpec


def abstract(shape, *spec, mesh=None, dtype=jnp.float32):
    """An array of no values, laid out by `spec` on a mesh of 4 x 2 devices or on `mesh`."""
    mesh = mesh or AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def chain(x, weights):
    """Five products in a scan, each with an all-reduce over `y`."""

    def body(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("x")), None

    x, _ = jax.lax.scan(body, x, weights)
    return x


X, WEIGHTS = ((16, 32), "x"), ((5, 32, 32), None, "y", None)
