"""Adapters on meshes: where their arrays lie, and checkpoints that go from one mesh to another."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora.io.checkpoint import checksums
from tests.support import processes, toy_model
from tests.support.checkpoints import same
from tests.support.compiler import FLAGS
from tests.support.methods import METHODS, fitting

SHAPES = {"4x2": (4, 2), "2x4": (2, 4), "8x1": (8, 1)}
SPECS = {
    "embed": PartitionSpec(None, "y"),
    "layers/up": PartitionSpec(None, "x", "y"),
    "layers/down": PartitionSpec("x"),
    "mix/kernel": PartitionSpec(("x", "y"), None),
}


def model(p, x):
    """A stacked kernel that is scanned, and a matrix: sizes that eight devices divide."""
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["up"]) @ w["down"], None), x @ p["mix"]["kernel"], p["layers"])
    return x @ p["embed"].T


def params():
    rng = np.random.default_rng(0)
    sizes = {"layers/up": (8, 16, 24), "layers/down": (8, 24, 16), "mix/kernel": (16, 16), "embed": (5, 16)}
    flat = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in sizes.items()}
    return {
        "embed": flat["embed"],
        "layers": {"up": flat["layers/up"], "down": flat["layers/down"]},
        "mix": {"kernel": flat["mix/kernel"]},
    }


def on_mesh(tree, name):
    mesh = jax.make_mesh(SHAPES[name], ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def put(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return jax.device_put(leaf, NamedSharding(mesh, SPECS[path]))

    return jax.tree_util.tree_map_with_path(put, tree)


def adapter(method=None):
    sites = jlora.trace(model, params(), jnp.ones((3, 16)))
    return toy_model.random_adapter(sites, method or jlora.DoRA(rank=2))


def test_factors_follow_their_weight():
    on = on_mesh(params(), "4x2")
    placed = jlora.shardings(adapter(), on)
    spec = {path: {name: s.spec for name, s in update.factors.items()} for path, update in placed.items()}
    assert spec["layers/up"]["a"] == PartitionSpec(None, "x", None)
    assert spec["layers/up"]["b"] == PartitionSpec(None, None, "y")
    assert spec["layers/up"]["m"] == PartitionSpec(None, "y")
    assert spec["layers/down"]["a"] == PartitionSpec("x", None, None)
    assert spec["layers/down"]["b"] == PartitionSpec("x", None, None)
    assert spec["mix/kernel"]["a"] == PartitionSpec(("x", "y"), None)
    assert spec["mix/kernel"]["b"] == PartitionSpec(None, None)
    assert spec["embed"]["a"] == PartitionSpec("y", None)  # the head contracts the embedding's width
    assert jax.tree.structure(placed) == jax.tree.structure(adapter())


def test_factors_of_a_weight_on_one_device_are_placed_on_it():
    device = jax.devices()[3]
    there = jax.device_put(params(), device)
    assert {s.device_set == {device} for s in jax.tree.leaves(jlora.shardings(adapter(), there))} == {True}
    with pytest.raises(ValueError, match="no such parameter"):
        jlora.shardings(adapter(), {"embed": there["embed"]})


def test_factors_of_a_weight_in_numpy_are_placed_on_the_default_device():
    default = {jax.local_devices()[0]}
    shardings = jlora.shardings(adapter(), jax.tree.map(np.asarray, params()))
    assert jax.tree.structure(shardings) == jax.tree.structure(adapter())
    assert [s.device_set for s in jax.tree.leaves(shardings)] == [default] * len(jax.tree.leaves(adapter()))


# Sizes that no rank, number of blocks or number of coefficients of the methods has by chance.
LAYERS, IN, OUT = 12, 20, 28
# Axes that have the length of one side, but are neither side: of the shorter side, and of the basis of FRoD.
FROD = {"l": -1, "l0": -1, "u": -2, "v": -1}
NEITHER = {("randlora", "b"): -1, ("randlora_shared", "b"): -1}
NEITHER |= {(f"frod{kind}", name): axis for kind in ("", "_apart") for name, axis in FROD.items()}
DIVIDED = {"bd_lora": OUT, "bd_lora_in": IN}
STACK = {"up": PartitionSpec("x", "y", None), "down": PartitionSpec(None, "y", "x"), "mix": PartitionSpec("y", "x")}


def stack(p, x):
    def layer(x, w):
        return jnp.tanh(x @ w["up"]) @ w["down"].T, None

    return jax.lax.scan(layer, x, {name: p[name] for name in ("up", "down")})[0] @ p["mix"]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_axis_as_long_as_one_of_the_weight_is_sharded_as_that_axis(name):
    """And every other axis, of ranks, blocks and coefficients, is replicated, but for the blocks of BD-LoRA."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shapes = {"up": (LAYERS, IN, OUT), "down": (LAYERS, IN, OUT), "mix": (IN, OUT)}
    weights = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, STACK[path]))
        for path, shape in shapes.items()
    }
    sites = jlora.trace(stack, weights, jax.ShapeDtypeStruct((3, IN), jnp.float32))
    targets = {path: fitting(name, sites[path]) for path in shapes}
    updates = jax.eval_shape(lambda p: jlora.init(jax.random.key(0), sites, targets, params=p), weights)
    shardings = jlora.shardings(updates, weights)
    for path, update in updates.items():
        mesh_axis = dict(zip(shapes[path], STACK[path], strict=True))
        if name in DIVIDED:  # its two blocks are parts of a side; `down` is used as its transpose
            along = mesh_axis[DIVIDED[name] if path != "down" else {IN: OUT, OUT: IN}[DIVIDED[name]]]
            mesh_axis[2] = along if along and 2 % mesh.shape[along] == 0 else None
        for group in ("factors", "frozen"):
            for array, axes in getattr(update, group).items():
                lengths = list(axes.shape)
                if (name, array) in NEITHER:
                    lengths[NEITHER[name, array]] = 0
                expected = PartitionSpec(*(mesh_axis.get(n) for n in lengths))
                spec = getattr(shardings[path], group)[array].spec
                assert (path, array, tuple(spec)) == (path, array, tuple(expected))


def test_an_adapted_program_on_a_mesh_computes_what_it_computes_on_one_device():
    made = adapter(jlora.LoRA(rank=2))
    apply = jax.jit(jlora.adapt(model))
    expected = apply(params(), made, jnp.ones((3, 16)))
    on = on_mesh(params(), "4x2")
    actual = apply(on, jax.device_put(made, jlora.shardings(made, on)), jnp.ones((3, 16)))
    assert np.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    on = on_mesh(params(), "4x2")
    placed = jax.device_put(adapter(), jlora.shardings(adapter(), on))
    folder = tmp_path_factory.mktemp("sharded") / "a"
    jlora.save(folder, placed, params=on)
    return folder


@pytest.mark.parametrize("name", ["4x2", "2x4", "8x1"])
def test_from_one_mesh_to_another(saved, name):
    on = on_mesh(params(), name)
    loaded = jlora.load(saved, params=on)
    same(jax.device_get(loaded), jax.device_get(adapter()))
    for array, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(jlora.shardings(loaded, on)), strict=True):
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        assert array.committed


def test_from_a_mesh_to_one_device(saved):
    loaded = jlora.load(saved, params=params())
    same(loaded, adapter())
    assert {a.committed for a in jax.tree.leaves(loaded)} == {False}
    there = jlora.load(saved, params=jax.device_put(params(), jax.devices()[5]))
    assert {a.device for a in jax.tree.leaves(there)} == {jax.devices()[5]}
    same(jlora.load(saved), adapter())


def test_abstract_parameters_say_where(saved):
    on = on_mesh(params(), "2x4")
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), on)
    loaded = jlora.load(saved, params=abstract)
    assert loaded["layers/up"].factors["a"].sharding.spec == PartitionSpec(None, "x", None)


def test_from_one_device_to_a_mesh(tmp_path):
    """The pieces of a checksum are distributed over several devices."""
    jlora.save(tmp_path / "a", adapter())
    on = on_mesh(params(), "2x4")
    same(jax.device_get(jlora.load(tmp_path / "a", params=on)), jax.device_get(adapter()))


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (0, 3)])
@pytest.mark.parametrize("limit", [1, 40, 4 << 20])
def test_pieces_tile_an_array(shape, limit, monkeypatch):
    monkeypatch.setattr(checksums, "PIECE_BYTES", limit)
    shard = tuple(-(-n // 2) for n in shape)
    seen = np.zeros(shape, int)
    for region in checksums.split(shape, shard, checksums.piece_shape(shard, 4)):
        seen[(*region, ...)] += 1
        assert seen[(*region, ...)].size * 4 <= max(limit, 4)
    assert (seen == 1).all()


@pytest.mark.parametrize("size", [1, 100, 4072, 10_000, 100_003])
def test_a_checksum_changes_with_every_bit(size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    before = checksums.checksum(data)
    for at in {0, size // 3, size // 2, size - 1}:
        for bit in range(8):
            altered = data.copy()
            altered[at] ^= 1 << bit
            assert checksums.checksum(altered) != before
    if size > 8192:  # blocks of a disk in each other's place
        moved = np.concatenate([data[4096:8192], data[:4096], data[8192:]])
        assert checksums.checksum(moved) != before


def test_many_pieces_and_shards(tmp_path, monkeypatch):
    """Arrays of many pieces go from one mesh to another, whose shards cut the pieces."""
    monkeypatch.setattr(checksums, "PIECE_BYTES", 64)
    on = on_mesh(params(), "4x2")
    placed = jax.device_put(adapter(), jlora.shardings(adapter(), on))
    jlora.save(tmp_path / "raw", placed, params=on)
    other = on_mesh(params(), "2x4")
    same(jax.device_get(jlora.load(tmp_path / "raw", params=other)), jax.device_get(adapter()))


def test_two_processes_read_their_own_shards(tmp_path):
    """Each loads from a copy that lacks the chunks of the other, and refuses one that lacks a chunk of its own."""
    command = [sys.executable, "-m", processes.__name__, str(tmp_path), str(processes.free_port())]
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {FLAGS}"}
    options = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    assert len(first["removed"]) == len(second["removed"]) >= 2
    assert set(first["removed"]).isdisjoint(second["removed"])
    for result in (first, second):
        assert "The array 'w:factors:a'" in result["refused"]
