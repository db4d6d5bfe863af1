"""BD-LoRA under tensor parallelism: the devices exchange what they exchange for the base, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.devices.test_meshes import sent
from tests.support import toy_model

WIDTH, HEADS, HEAD, HIDDEN = 32, 8, 4, 64
SPECS = {"up": P(None, "model"), "down": P("model"), "heads": P(None, "model"), "out": P("model")}
SIZES = {
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
    "heads": (WIDTH, HEADS, HEAD),
    "out": (HEADS, HEAD, WIDTH),
}


def model(p: dict, x: jax.Array) -> jax.Array:
    """A column-parallel and a row-parallel product, of matrices, and of kernels with an axis of heads."""
    y = jnp.einsum("td,dhe->the", x, p["heads"])
    x = x + jnp.einsum("the,hed->td", jnp.tanh(y), p["out"])
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def on_mesh(data: int) -> tuple[Any, dict, jax.Array]:
    mesh = jax.make_mesh((data, 8 // data), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=size).astype(np.float32) / size[0] ** 0.5 for name, size in SIZES.items()}
    params = jax.device_put(values, {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()})
    x = jax.device_put(rng.normal(size=(16, WIDTH)).astype(np.float32), NamedSharding(mesh, P("data")))
    return mesh, params, x


def step(fun: Any) -> Any:
    return lambda params, x, *adapter: jnp.square(fun(params, *adapter, x)).mean()


@pytest.mark.parametrize(("blocks", "data"), [(8, 1), pytest.param(8, 2, marks=pytest.mark.nightly)])
def test_nothing_is_sent_that_the_base_does_not_send(blocks: int, data: int) -> None:
    mesh, params, x = on_mesh(data)
    sites = jlora.trace(model, params, x)
    columns, rows = (jlora.BDLoRA(8, blocks, side, 4.0) for side in ("out", "in"))
    adapter = toy_model.random_adapter(sites, {"up|heads": columns, "down|out": rows})
    expected = jax.value_and_grad(lambda x: step(model)(jlora.merge(params, adapter), x))(x)
    adapter = jax.device_put(adapter, jlora.shardings(adapter, params))
    blocks_of = {path: update.factors["b"].sharding.spec[0] for path, update in adapter.items()}
    assert blocks_of == dict.fromkeys(SIZES, "model")
    with jax.set_mesh(mesh):
        base = jax.jit(jax.value_and_grad(step(model), 1)).lower(params, x).compile()
        run = jax.jit(jax.value_and_grad(step(jlora.adapt(model, on_dense="error")), 1)).lower(params, x, adapter)
        forward = jax.jit(jlora.adapt(model)).lower(params, adapter, x).compile()
        actual = run.compile()
        assert sent(forward) == sent(jax.jit(model).lower(params, x).compile())
        assert sent(actual) == sent(base)
        got = actual(params, x, adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_gradients_of_the_factors_are_those_of_the_merged_program() -> None:
    mesh, params, x = on_mesh(1)
    targets = {"up|heads": jlora.BDLoRA(8, 8), "down|out": jlora.BDLoRA(8, 8, "in")}
    adapter = toy_model.random_adapter(jlora.trace(model, params, x), targets)
    merged = jax.grad(lambda adapter: step(model)(jlora.merge(params, adapter), x))
    expected = jax.jit(merged)(adapter)
    with jax.set_mesh(mesh):
        placed = jax.device_put(adapter, jlora.shardings(adapter, params))
        run = jax.jit(jax.grad(lambda adapter: step(jlora.adapt(model))(params, x, adapter))).lower(placed).compile()
        actual = run(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)
    assert {name for name, _ in sent(run)} <= {"all-reduce"}
    assert {shape for _, shape in sent(run)} == {(16, WIDTH)}


def test_blocks_that_the_devices_do_not_divide_are_replicated() -> None:
    _, params, x = on_mesh(1)
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, x), {"up": jlora.BDLoRA(8, 4)})
    shardings = jlora.shardings(adapter, params)["up"]
    assert [tuple(s.spec) for s in jax.tree.leaves(dataclasses.asdict(shardings)["factors"])] == [(None,) * 3] * 2
