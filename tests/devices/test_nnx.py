"""Adapted modules of Flax NNX on a mesh: factors and their annotations follow the weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
TARGETS = {"kernel": jlora.LoRA(2)}


def linear(annotation, mesh=None):
    initializer = nnx.with_partitioning(nnx.initializers.lecun_normal(), annotation, mesh=mesh)
    return nnx.Linear(8, 16, use_bias=False, kernel_init=initializer, rngs=nnx.Rngs(0))


def factors(model):
    return model.kernel_lora.update.factors


@pytest.mark.nightly
@pytest.mark.parametrize("annotation", [("data", "model"), P("data", "model"), ("data",)], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_factors_follow_the_weight(annotation, kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    out = "model" if len(annotation) > 1 else None
    with jax.set_mesh(mesh):
        model = jlora.nnx.adapt(linear(annotation), TARGETS, X, rngs=nnx.Rngs(1))
        make: Any = nnx.jit(lambda: jlora.nnx.adapt(linear(annotation), TARGETS, X, rngs=nnx.Rngs(1)))
        for each in (model, make()):
            a, b = (factors(each)[name] for name in ("a", "b"))
            assert type(a.get_metadata("out_sharding")) is type(annotation)
            assert tuple(a.get_metadata("out_sharding")) == ("data", None)
            assert tuple(b.get_metadata("out_sharding")) == (None, out)
            assert a[...].sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
            assert b[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, out)), 2)
            specs: Any = nnx.get_partition_spec(nnx.state(each))
            assert specs["kernel_lora"]["update"]["factors"]["a"].get_value() == P("data", None)
        jlora.nnx.set_adapter(model, jax.tree.map(lambda v: v + 0.1, jlora.nnx.adapter(model)))
        x = jax.device_put(X, NamedSharding(mesh, P()))
        y = nnx.jit(lambda module, x: module(x))(model, x)
        expected = X @ (np.asarray(model.kernel[...]) + np.asarray(factors(model)["a"][...]) @ factors(model)["b"][...])
    np.testing.assert_allclose(y, np.asarray(expected), rtol=1e-4, atol=1e-5)


def test_a_weight_without_a_mesh_keeps_its_annotation():
    """A module that was annotated and created without a mesh, as for a checkpoint to come."""
    with nnx.use_eager_sharding(False):
        plain = linear(("data", "model"))
        model = jlora.nnx.adapt(plain, TARGETS, X, rngs=nnx.Rngs(1))
    assert factors(model)["b"].get_metadata("out_sharding") == (None, "model")
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-5)
