"""Plans: what a compiled step takes of each device, on the CPU's simulated ones and, with libtpu, on TPUs."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jlora
from benchmarks import plan as benchmark
from benchmarks._llama import Sizes
from benchmarks._plan_report import count_weight_gathers
from benchmarks._plan_rows import Row
from jlora._plan import hlo as _hlo
from jlora._plan import topology as _topology
from tests.support import toy_model

P = PartitionSpec


def abstract(shape, *spec, mesh=None, dtype=jnp.float32):
    mesh = mesh or AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def chain(x, weights):
    """Five products in a scan, each reduced over `y`; one whole array besides. What is carried is not divided."""

    def body(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("x")), None

    x, _ = jax.lax.scan(body, x, weights)
    return x


X, WEIGHTS = ((16, 32), "x"), ((5, 32, 32), None, "y", None)


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


def test_arrays_numbers_and_what_has_no_sharding():
    """Arrays are planned by their shapes, what lies nowhere is replicated, and numbers stay numbers."""

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


def test_a_loop_of_unknown_length_is_said_to_be_one():
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


# A loop's length as HLO says it, and as the TPU's leaves it to be read from the counter; an all-gather that the TPU
# spreads over two computations; and what a start's result holds besides.
HLO = """HloModule m

%done (p: f32[2,8]) -> f32[4,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %g.2 = f32[4,8]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%body (c: (s32[], f32[2,8], f32[8,8])) -> (s32[], f32[2,8], f32[8,8]) {
  %c = (s32[], f32[2,8], /*index=2*/f32[8,8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[2,8]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%c), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %g.1 = f32[4,8]{1,0} all-gather(%x), channel_id=3, dimensions={0}
  %f = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  %y = f32[2,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %s = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%y), channel_id=4
  %z = f32[2,8]{1,0} collective-permute-done(%s)
  ROOT %t = (s32[], f32[2,8], f32[8,8]) tuple(%next, %z, %w)
}

%test (c: (s32[], f32[2,8], f32[8,8])) -> pred[] {
  %c = (s32[], f32[2,8], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(11)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[2,8], w: f32[8,8]) -> f32[2,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %one = s32[] constant(1)
  %copy = s32[] copy(%one)
  %t = (s32[], f32[2,8], f32[8,8]) tuple(%copy, %x, %w)
  %loop = (s32[], f32[2,8], f32[8,8]) while(%t), condition=%test, body=%bodySAID
  ROOT %out = f32[2,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("change", "turns", "exact"),
    [
        (("SAID", ""), 5, True),
        (("SAID", ', backend_config={"known_trip_count":{"n":"7"}}'), 7, True),
        (("direction=LT", "direction=NE"), 1, False),
        (("constant(2)", "iota()"), 1, False),
    ],
)
def test_hlo(change, turns, exact):
    cost = _hlo.cost(HLO.replace(*change).replace("SAID", ""))
    assert (cost.flops, cost.exact) == (turns * 2 * 2 * 8 * 8, exact)
    assert [(c.kind, c.shape, c.bytes, c.count, c.exact) for c in cost.collectives] == [
        ("all-gather", "f32[4,8]", 4 * 8 * 4, turns, exact),
        ("collective-permute", "f32[2,8]", 2 * 8 * 4, turns, exact),
    ]


# The batch of a product is a spatial axis to the TPU: dilated or padded so that each place sees one number.
@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "multiplications"),
    [
        ((4, 16), (16, 8), (4, 8), "dim_labels=bf_io->bf", 4 * 16 * 8),
        ((2, 4, 16), (2, 16, 8), (2, 4, 8), "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf", 2 * 4 * 16 * 8),
        (
            (2, 4, 16),
            (2, 16, 8),
            (2, 4, 8),
            "window={size=2 stride=2 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            2 * 4 * 16 * 8,
        ),
        ((1, 5, 3), (3, 3, 2), (1, 5, 2), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (2 + 3 * 3 + 2) * 3 * 2),
    ],
)
def test_convolutions(left, right, out, rest, multiplications):
    assert _hlo._convolution(rest, left, right, out) == multiplications


if importlib.util.find_spec("libtpu"):

    @pytest.mark.parametrize("name", ["v5e:2x4", "v4:2x2x2", "v6e:2x4"])
    def test_on_a_tpu(name):
        """The figures of the CPU, but that each device keeps a part of each sum, in the type of the TPU's choice."""
        plan = jlora.plan(chain, abstract((64, 512), "x"), abstract((5, 512, 512), None, "y"), topology=name)
        assert (plan.devices, plan.fits, plan.exact) == (8, True, True)
        assert plan.hbm is not None
        assert 0 < plan.needed < plan.hbm
        assert plan.flops == 5 * 2 * 16 * 512 * 256
        assert [(c.kind, c.count, c.exact) for c in plan.collectives] == [("reduce-scatter", 5, True)]
        assert plan.collectives[0].bytes in (16 * 512 * 2, 16 * 512 * 4)

    def test_a_mesh_that_is_no_product_of_the_torus():
        mesh = AbstractMesh((8, 8), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        plan = jlora.plan(lambda x: x @ x, abstract((64, 64), "x", "y", mesh=mesh), topology="v5p:4x4x4")
        assert plan.devices == 64
        assert plan.collectives

    @pytest.mark.parametrize("base", ["bf16", "nf4"])
    def test_no_more_than_by_hand(base):
        """Four scanned layers take what LoRA written into the model takes, and gather its weights as often."""
        sizes = Sizes(4, 2048, 8192, 16, 8, vocabulary=8192)
        row = Row(sizes, "v5e:2x4", (1, 2, 4), 2, base=base)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            ours, by_hand = (benchmark.measure(row, form) for form in ("jlora", "by hand"))
        assert ours["temporary_bytes"] <= 1.02 * by_hand["temporary_bytes"]
        assert ours["flops"] <= 1.005 * by_hand["flops"]
        assert count_weight_gathers(row, ours) <= count_weight_gathers(row, by_hand)

    def test_what_does_not_fit():
        """The refusal comes back with the compiler's figures."""
        x = abstract((8, 2**32), "x", "y")
        plan = jlora.plan(lambda x: x.sum(), x, topology="v5e:2x4")
        assert plan.fits is False
        assert plan.needed == 2 * 2**31 * 4
        assert plan.hbm == int(15.75 * 2**30)
        assert "does not fit, 16 GiB of 15.75 GiB a device" in str(plan)

    @pytest.mark.parametrize("name", ["v5e:3x5", "v9z:2x2", "nonsense"])
    def test_unknown_topologies(name):
        with pytest.raises(ValueError, match=rf"no topology '{name}'.*v5e:16x16"):
            jlora.topology(name)

    def test_every_generation_is_known():
        for name in ("v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
            devices = jlora.topology(name)
            assert devices is jlora.topology(name)
            assert _topology.hbm(devices[0]) is not None
