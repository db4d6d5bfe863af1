"""Plans: what a compiled step takes of each device, on the CPU's simulated devices."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import jlora
from jlora._plan import topology as _topology
from tests.support import toy_model
from tests.support.plans import WEIGHTS, P, X, abstract, chain


def moved(plan, kind):
    return {(c.shape.split("{")[0], c.count) for c in plan.collectives if c.kind == kind}


def test_collectives_and_flops_of_a_loop():
    plan = jlora.plan(chain, abstract(*X), abstract(*WEIGHTS), topology="cpu:8")
    assert (plan.devices, plan.fits, plan.hbm, plan.refusal) == (8, None, None, None)
    assert plan.exact
    assert plan.flops == 5 * 2 * 4 * 32 * 16  # of 16 x 32 x 32, a fourth of the rows and half of the sum
    # Four rows of 32 numbers, in each of five turns.
    assert [(c.kind, c.shape, c.bytes, c.count, c.exact) for c in plan.collectives] == [
        ("all-reduce", "f32[4,32]", 4 * 32 * 4, 5, True)
    ]


def test_sizes():
    """Bytes a device follow from shapes and shardings; what is donated is aliased."""

    def step(x, y):
        return x + 1, y.sum()

    x, y = abstract((16, 32), "x"), abstract((8, 64), "x", "y")
    plan = jlora.plan(jax.jit(step, donate_argnums=0, out_shardings=(P("x"), P())), x, y, topology="cpu:8")
    assert plan.argument_bytes == 4 * 32 * 4 + 2 * 32 * 4
    assert plan.aliased_bytes == 4 * 32 * 4
    parts = (plan.argument_bytes, plan.output_bytes, plan.temporary_bytes, plan.code_bytes)
    assert plan.needed == sum(part or 0 for part in parts) - (plan.aliased_bytes or 0)
    assert jlora.plan(step, x, y, topology="cpu:8").aliased_bytes == 0


def test_the_mesh_may_be_of_any_kind():
    """Abstract, or of devices; of the first eight in another order it stays as it is."""
    devices = np.array(jlora.topology("cpu:8"))[::-1].reshape(4, 2)
    meshes = [
        None,
        jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2),
        jax.sharding.Mesh(devices, ("x", "y")),
        AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2),
    ]

    def product(x, w):
        return x @ w

    plans = [
        jlora.plan(product, abstract((16, 32), "x", mesh=m), abstract((32, 32), None, "y", mesh=m), topology="cpu:8")
        for m in meshes
    ]
    assert len({(p.argument_bytes, p.flops, p.collectives) for p in plans}) == 1


def test_arrays_numbers_and_arguments_without_a_sharding():
    """Arrays are planned by their shapes, an argument without a sharding is replicated, and numbers stay numbers."""

    def step(x, scale, key, by, flag=None):
        return x * scale + jax.random.normal(key, x.shape) * by if flag else x

    args = (abstract((16, 32), "x"), np.ones((16, 32), np.float32), jax.random.key(0), 2.0)
    jitted = jax.jit(step, static_argnames="flag")
    plan = jlora.plan(jitted, *args, topology="cpu:8", flag=True)
    assert plan.argument_bytes is not None
    assert 4 * 32 * 4 + 16 * 32 * 4 <= plan.argument_bytes < 2 * 16 * 32 * 4


def test_one_device_needs_no_mesh():
    plan = jlora.plan(lambda x: x @ x, jnp.ones((8, 8)), topology="cpu:1")
    assert (plan.devices, plan.flops, plan.collectives) == (1, 2 * 8**3, ())
    assert "no collectives" in str(plan)


def test_a_training_step_of_an_adapter():
    """The state of the adapter alone is donated, and no weight is gathered that the base does not gather."""
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    specs = {"up": P(None, None, "y"), "down": P(None, "y", None)}
    params = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: abstract(leaf.shape, *specs.get(keys[-1].key, P()), mesh=mesh), toy_model.params()
    )
    adapter = jlora.shardings(toy_model.adapter(), params)
    adapter = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), toy_model.adapter(), adapter
    )
    tokens = abstract((4, 6), "x", mesh=mesh, dtype=jnp.int32)
    apply, tx = jlora.adapt(toy_model.model), optax.sgd(0.1)

    def step(adapter, params, tokens):
        grads = jax.grad(lambda a: toy_model.loss(apply(params, a, tokens)))(adapter)
        return optax.apply_updates(adapter, tx.update(grads, tx.init(adapter))[0])

    plan = jlora.plan(jax.jit(step, donate_argnums=0), adapter, params, tokens, topology="cpu:8")
    assert plan.exact
    assert plan.flops
    assert plan.aliased_bytes is not None
    assert plan.output_bytes is not None
    assert 0 < plan.aliased_bytes <= plan.output_bytes
    assert not moved(plan, "all-gather")
    assert moved(plan, "all-reduce")


def test_printed_and_as_json():
    plan = jlora.plan(chain, abstract(*X), abstract(*WEIGHTS), topology="cpu:8")
    read = json.loads(plan.json())
    assert read["temporary_bytes"] == plan.temporary_bytes
    assert read["collectives"][0] | {"kind": "all-reduce", "count": 5} == read["collectives"][0]
    assert "all-reduce" in str(plan)
    assert f"{plan.argument_bytes:,}" in str(plan)
    assert repr(plan) == str(plan)


def test_a_loop_of_unknown_length_is_reported():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: jax.lax.with_sharding_constraint(x @ w, P("x")), x)

    plan = jlora.plan(until, abstract(*X), abstract((32, 32), "y", None), topology="cpu:8")
    assert not plan.exact
    assert plan.flops == 2 * 4 * 32 * 16
    assert not any(c.exact for c in plan.collectives)
    assert "unknown length" in str(plan)


def step(x):
    return x + 1


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("cpu:99", (np.ones(3),), "xla_force_host_platform_device_count=99"),
        ("cpu:8", (np.ones(3),), "no argument says how it is divided"),
        ("cpu:4", (abstract((8,), "x"),), r"\{'x': 4, 'y': 2\} has 8 devices, and cpu:4 has 4"),
        (
            "cpu:8",
            ({"a": abstract((8,), "x"), "b": abstract((8,), "z", mesh=AbstractMesh((8,), ("z",)))},),
            "more than one mesh: 0/0/a.*0/0/b",
        ),
    ],
)
def test_errors(name, args, message):
    with pytest.raises(ValueError, match=message):
        jlora.plan(step, *args, topology=name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _topology._tpu.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'jlora\[plan\]'"):
        jlora.topology("v5e:4x4")
