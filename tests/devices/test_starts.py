"""Starts that take the factors from a weight, on eight devices whose mesh has Explicit axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora

METHODS = [*(jlora.LoRA(2, start=start) for start in ("pissa", "pissa_niter_2", "olora")), jlora.LoRAXS(2)]
WEIGHT = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)


def product(params: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,io->bo", x, params["w"], out_sharding=PartitionSpec())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_start_from_a_sharded_weight_is_that_from_the_whole_weight(method: jlora.Method) -> None:
    x, key = jnp.ones((2, 8)), jax.random.key(0)
    plain = {"w": jnp.asarray(WEIGHT)}
    expected = jlora.init(key, jlora.trace(lambda p, x: x @ p["w"], plain, x), method, params=plain)["w"]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec("data", "model")))}
        sites = jlora.trace(product, params, x)
        adapter = jax.jit(lambda params: jlora.init(key, sites, method, params=params))(params)
        adapted = jax.jit(jlora.adapt(product, on_dense="error"))(params, adapter, x)
        base = product(params, x)
    np.testing.assert_allclose(adapted, base, atol=1e-5)
    actual = {**adapter["w"].factors, **adapter["w"].frozen}
    for name, array in {**expected.factors, **expected.frozen}.items():
        np.testing.assert_allclose(actual[name], array, atol=1e-5)
