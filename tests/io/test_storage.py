"""Checkpoints in every storage that Orbax has: zarr 2 and zarr 3, with and without OCDBT."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.io.checkpoint import checksums
from tests.support import toy_model
from tests.support.checkpoints import same

STORAGES = {
    f"zarr{3 if zarr3 else 2}_{'ocdbt' if ocdbt else 'files'}": {"use_zarr3": zarr3, "use_ocdbt": ocdbt}
    for zarr3, ocdbt in itertools.product([False, True], repeat=2)
}
STATE = {
    "int4": jnp.arange(-8, 8, dtype=jnp.int4).reshape(2, 8),
    "float8": jnp.arange(24.0).reshape(4, 6).astype(jnp.float8_e4m3fn),
    "bfloat16": jnp.linspace(-1, 1, 35, dtype=jnp.bfloat16).reshape(5, 7),
    "flags": jnp.array([True, False, True]),
    "scalar": jnp.float32(0.1),
    "empty": jnp.zeros((0, 3)),
    "numpy": np.arange(12.0).reshape(3, 4),
    "key": jax.random.key(7),
    "step": 5,
}


@pytest.fixture(params=STORAGES)
def storage(request):
    return STORAGES[request.param]


def write(folder, adapter, state=None, compress=True, chunked=True, **options):
    """Saves with Orbax alone, in its own chunks if not `chunked`."""
    items = jlora.checkpoint_args(adapter, state)
    if not chunked:
        items["arrays"] = ocp.args.PyTreeSave(vars(items["arrays"])["item"])
    arrays = ocp.PyTreeCheckpointHandler(use_compression=compress, **options)
    handler = ocp.CompositeCheckpointHandler(arrays=arrays, jlora=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=ocp.args.Composite(**items))
    return folder


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_all_storages_and_dtypes(tmp_path, storage, compress):
    adapter = toy_model.adapter()
    folder = write(tmp_path / "a", adapter, STATE, compress, **storage)
    same(jlora.load(folder), adapter)
    same(jlora.load_state(folder, STATE), STATE)


def test_chunks_that_orbax_chooses(tmp_path, storage):
    folder = write(tmp_path / "a", toy_model.adapter(), chunked=False, **storage)
    same(jlora.load(folder), toy_model.adapter())


@pytest.mark.parametrize("spec", [P("x"), P("y", "x"), P(None, ("x", "y"))], ids=str)
def test_chunks_and_pieces_that_a_mesh_cuts(tmp_path, storage, spec, monkeypatch):
    """Shards, chunks and pieces of checksums have different borders; some arrays are not a multiple of any."""
    monkeypatch.setattr(checksums, "PIECE_BYTES", 600)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    values = np.random.default_rng(0).normal(size=(48, 40)).astype(np.float32)
    odd = np.random.default_rng(1).normal(size=(37, 29)).astype(np.float32)
    placed = jax.device_put(values, NamedSharding(mesh, P("y")))
    folder = write(tmp_path / "a", toy_model.adapter(), {"w": placed, "odd": odd}, **storage)
    like = {"w": jax.ShapeDtypeStruct(values.shape, np.float32, sharding=NamedSharding(mesh, spec)), "odd": odd}
    loaded = jlora.load_state(folder, like)
    assert loaded["w"].sharding == like["w"].sharding
    same(jax.device_get(loaded), {"w": values, "odd": odd})


def test_another_kind_of_memory(tmp_path):
    """An array that was offloaded to the host's memory goes there again."""
    values = jnp.arange(24.0).reshape(8, 3)
    folder = write(tmp_path / "a", toy_model.adapter(), {"w": values})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    like = jax.ShapeDtypeStruct(
        values.shape, values.dtype, sharding=NamedSharding(mesh, P("x"), memory_kind="pinned_host")
    )
    loaded = jlora.load_state(folder, {"w": like})["w"]
    assert loaded.sharding == like.sharding
    assert np.array_equal(jax.device_get(loaded), values)


def test_a_bit_that_changed(tmp_path, storage):
    """The error names the array."""
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    folder = write(tmp_path / "a", toy_model.adapter(), {"v": values, "w": 2 * values}, compress=False, **storage)
    stored = (2 * values).tobytes()
    files = [file for file in (folder / "arrays").rglob("*") if file.is_file() and stored in file.read_bytes()]
    content = bytearray(files[0].read_bytes())
    content[content.index(stored) + 1717] ^= 4
    files[0].write_bytes(content)
    with pytest.raises(jlora.CheckpointError, match=r"checksums differ.*\n  state::w: float32\(40, 30\)$"):
        jlora.load_state(folder, {"v": values, "w": values})
    same(jlora.load(folder), toy_model.adapter())


@pytest.mark.parametrize("zarr3", [False, True], ids=["zarr2", "zarr3"])
def test_a_chunk_or_a_description_that_is_gone(tmp_path, zarr3):
    folder = write(tmp_path / "a", toy_model.adapter(), use_ocdbt=False, use_zarr3=zarr3)
    array = folder / "arrays" / "embed:factors:b"
    for file in (array / ("c/0/0" if zarr3 else "0.0"), array / ("zarr.json" if zarr3 else ".zarray")):
        content = file.read_bytes()
        for damaged in (None, b"", content[: len(content) // 2]):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(jlora.CheckpointError, match=r"The array 'embed:factors:b' in .* is missing or damaged"):
                jlora.load(folder)
            file.write_bytes(content)
    same(jlora.load(folder), toy_model.adapter())


def test_an_array_of_another_shape(tmp_path):
    folder = write(tmp_path / "a", toy_model.adapter(), use_ocdbt=False)
    file = folder / "arrays" / "embed:factors:b" / ".zarray"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"shape": [2, 9]}))
    with pytest.raises(
        jlora.CheckpointError, match=r"'embed:factors:b' .* expected float32\(2, 8\), found float32\(2, 9\)"
    ):
        jlora.load(folder)


@pytest.mark.parametrize("change", [{"zarr_format": 4}, {"codecs": [{"name": "of_tomorrow"}]}], ids=str)
def test_a_description_of_an_unknown_format(tmp_path, change):
    folder = write(tmp_path / "a", toy_model.adapter(), use_ocdbt=False, use_zarr3=True)
    file = folder / "arrays" / "embed:factors:b" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(jlora.CheckpointError, match=r"'embed:factors:b' .* is not in a format that this release reads"):
        jlora.load(folder)


def test_a_folder_of_an_unknown_format(tmp_path):
    """It is not called damaged, and a database that lost its index is."""
    folder = write(tmp_path / "a", toy_model.adapter())
    (folder / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(jlora.CheckpointError, match=r"The arrays in .* are missing"):
        jlora.load(folder)
    shutil.rmtree(folder / "arrays")
    with pytest.raises(jlora.CheckpointError, match=r"The arrays in .* are missing"):
        jlora.load(folder)
    (folder / "arrays").mkdir()
    (folder / "arrays" / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(jlora.CheckpointError, match=r"not in a format that this release reads.* model\.safetensors"):
        jlora.load(folder)
