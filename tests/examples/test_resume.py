"""Training that was stopped or killed resumes with the same bits, on one device and on eight."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jlora
import resume
from tests.support import toy_model
from tests.support.checkpoints import same

STEPS, EVERY = 16, 4


@pytest.fixture(scope="module", params=[1, 8], ids=lambda count: f"{count}_devices")
def uninterrupted(request, tmp_path_factory):
    """A run that was not stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return request.param, folder, train(folder, STEPS, request.param)


def train(folder, steps, count):
    """Runs the example, whose optimiser promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return resume.train(folder, steps, EVERY, count)


def test_resume_is_exact(uninterrupted, tmp_path):
    """2N steps in one run equal N steps, a restart, and N steps, with saves in the background."""
    count, _, (adapter, state, losses) = uninterrupted
    *_, first = train(tmp_path, STEPS // 2, count)
    again_adapter, again_state, second = train(tmp_path, STEPS, count)
    same(again_adapter, adapter)
    same(again_state, state)
    assert first + second == losses
    assert {a.sharding.num_devices for a in jax.tree.leaves(again_adapter)} == {count}


@pytest.mark.parametrize("uninterrupted", [pytest.param(1, marks=pytest.mark.nightly), 8], indirect=True)
def test_resume_after_a_kill(uninterrupted, tmp_path):
    """The same with a process that is killed after the second checkpoint began."""
    count, _, (adapter, state, losses) = uninterrupted
    command = [sys.executable, resume.__file__, f"--folder={tmp_path}", f"--steps={STEPS}"]
    process = subprocess.Popen([*command, f"--every={EVERY}", f"--devices={count}"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        for line in out:
            if line.startswith(f"step {2 * EVERY + 1} "):
                process.send_signal(signal.SIGKILL)
                break
    process.wait()
    again_adapter, again_state, rest = train(tmp_path, STEPS, count)
    assert len(losses) > len(rest) >= STEPS - 3 * EVERY
    same(again_adapter, adapter)
    same(again_state, state)
    assert rest == losses[-len(rest) :]


def test_the_latest_and_the_best_are_kept(uninterrupted):
    _, folder, (*_, losses) = uninterrupted
    kept = {int(path.name) for path in folder.iterdir()}
    best = min(range(EVERY, STEPS + 1, EVERY), key=lambda step: losses[step - 1])
    assert kept == {STEPS - EVERY, STEPS, best}


def state(adapter):
    """One leaf of every kind."""
    return {
        "optimiser": optax.adam(1e-3).init(adapter),
        "key": jax.random.key(3),
        "old key": jax.random.PRNGKey(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        "numpy": np.arange(3.0),
        "none": np.zeros((0, 2), np.int8),
        "flag": jnp.array(True),
        "a/b": 2**100,
        "rng": np.random.default_rng(5).bit_generator.state,
        "float": 0.1,
        "true": True,
    }


def put(folder, adapter, tree):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(7, args=ocp.args.Composite(**jlora.checkpoint_args(adapter, tree)))
    return folder / "7"


def test_a_state_of_every_kind(tmp_path):
    adapter = toy_model.adapter()
    tree = state(adapter)
    folder = put(tmp_path, adapter, tree)
    same(jlora.load(folder), adapter)
    same(jlora.load_state(folder, tree), tree)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "dtype") else a, tree)
    del abstract["numpy"], abstract["none"]
    with pytest.raises(jlora.CheckpointError, match=r"numpy: saved, but not in the tree"):
        jlora.load_state(folder, abstract)


def test_a_compressed_state_goes_to_a_mesh(tmp_path):
    """Orbax compresses by default, and a state may have any sharding."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("y", "x")
    wide = jax.random.normal(jax.random.key(0), (64, 32))
    folder = put(tmp_path, toy_model.adapter(), {"wide": jax.device_put(wide, jax.sharding.NamedSharding(mesh, spec))})
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    loaded = jlora.load_state(folder, {"wide": jax.ShapeDtypeStruct(wide.shape, wide.dtype, sharding=other)})["wide"]
    assert loaded.sharding == other
    assert np.array_equal(loaded, wide)


def test_a_save_in_the_background_has_the_values_of_its_step(tmp_path):
    """Steps that reuse the buffers go on while Orbax writes."""
    adapter = {"w": jlora.Update({"d": jnp.zeros((1024, 512))}, jlora.Full(), ("in", "out"), (1024, 512))}
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    with ocp.CheckpointManager(tmp_path) as manager:
        for number in range(5):
            manager.save(number, args=ocp.args.Composite(**jlora.checkpoint_args(adapter)))
            adapter = step(step(adapter))
    for number in range(5):
        loaded = jlora.load(tmp_path / str(number))
        assert np.array_equal(loaded["w"].factors["d"], np.full((1024, 512), 2.0 * number))
        step(loaded)  # loaded arrays may be donated too


def test_another_tree_is_refused_with_every_difference(tmp_path):
    adapter = toy_model.adapter()
    folder = put(tmp_path, adapter, {"step": 3, "m": jnp.ones((2, 3)), "seed": 1, "gone": 0, "key": jax.random.key(0)})
    other = {"step": 0.5, "m": jnp.ones((3, 2)), "seed": jnp.ones(()), "new": 1, "key": jax.random.key(0, impl="rbg")}
    with pytest.raises(jlora.CheckpointError) as caught:
        jlora.load_state(folder, other)
    for line in (
        "step: saved as int, in the tree float",
        "m: saved as float32(2, 3), in the tree float32(3, 2)",
        "seed: saved as int, in the tree float32()",
        "gone: saved, but not in the tree",
        "new: in the tree, but not saved",
        "key: saved as key<fry>(), in the tree key<rbg>()",
    ):
        assert line in str(caught.value)


def test_a_state_that_was_never_saved(tmp_path):
    jlora.save(tmp_path / "a", toy_model.adapter())
    with pytest.raises(jlora.CheckpointError, match="holds an adapter without a state"):
        jlora.load_state(tmp_path / "a", {"step": 0})
    with pytest.raises(TypeError, match="'step' has type bytes"):
        jlora.checkpoint_args(toy_model.adapter(), {"step": b"3"})


def test_other_items_in_the_same_checkpoint(tmp_path):
    adapter = toy_model.adapter()
    with ocp.CheckpointManager(tmp_path) as manager:
        items = jlora.checkpoint_args(adapter, params=toy_model.params())
        manager.save(0, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave({"run": "a"})))
        assert manager.restore(0, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes == {"run": "a"}
    same(jlora.load(tmp_path / "0", params=toy_model.params()), adapter)
    assert json.loads(Path(tmp_path / "0" / "jlora" / "metadata").read_text())["base"]
