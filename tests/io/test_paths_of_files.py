"""Paths as users write them: `~`, strings and `Path`, links, folders in folders."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora

rng = np.random.default_rng(0)
SHAPES = {"up.weight": (12, 8), "q.weight": (8, 8)}
STATE = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
PARAMS = {name.split(".")[0]: jnp.asarray(tensor.T) for name, tensor in STATE.items()}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home folder, which is the working folder too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(STATE, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"hidden_size": 8}')


def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["q"] @ params["up"]


def test_the_home_folder(home):
    checkpoint(home / "base")
    names = jlora.peft.infer_names(PARAMS, "~/base")
    jlora.hf.save_merged("~/merged", PARAMS, names, like="~/base")
    np.testing.assert_array_equal(load_file(home / "merged" / "model.safetensors")["q.weight"], STATE["q.weight"])
    sites = jlora.trace(model, PARAMS, jnp.ones((2, 8)))
    expected = jlora.init(jax.random.key(0), sites, jlora.LoRA(2))
    jlora.peft.save("~/peft", expected, names)
    jlora.kohya.save("~/lora.safetensors", expected, {"up": "up", "q": "q"})
    for loaded in (
        jlora.peft.load(Path("~/peft"), sites, names),
        jlora.kohya.load("~/lora.safetensors", sites, {"up": "up", "q": "q"}),
    ):
        np.testing.assert_array_equal(loaded["q"].factors["a"], expected["q"].factors["a"])
    entries = sorted(entry.name for entry in home.iterdir())
    assert entries == ["base", "lora.safetensors", "merged", "peft"]  # and no folder `~`


def test_links_in_the_checkpoint_become_files(tmp_path):
    """The cache of huggingface_hub links the files of a snapshot to blobs."""
    checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        file.chmod(0o444)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (tmp_path / "linked").symlink_to(snapshot)
    names = jlora.peft.infer_names(PARAMS, tmp_path / "linked")
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").symlink_to("empty")
    jlora.hf.save_merged(tmp_path / "target", {**PARAMS, "q": PARAMS["q"] + 1}, names, like=tmp_path / "linked")
    files = sorted((tmp_path / "empty").iterdir())
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert not any(file.is_symlink() for file in files)
    np.testing.assert_array_equal(load_file(files[1])["q.weight"], STATE["q.weight"] + 1)
    np.testing.assert_array_equal(load_file(tmp_path / "blobs" / "model.safetensors")["q.weight"], STATE["q.weight"])


def test_shards_in_folders_keep_their_places(tmp_path):
    (tmp_path / "base" / "part").mkdir(parents=True)
    places = {"up.weight": "one.safetensors", "q.weight": "part/one.safetensors"}
    for name, file in places.items():
        save_file({name: STATE[name]}, tmp_path / "base" / file)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    names = jlora.peft.infer_names(PARAMS, tmp_path / "base")
    jlora.hf.save_merged(tmp_path / "merged", jax.tree.map(lambda a: 2 * a, PARAMS), names, like=tmp_path / "base")
    for name, file in places.items():
        np.testing.assert_array_equal(load_file(tmp_path / "merged" / file)[name], 2 * STATE[name])


def test_a_folder_in_the_checkpoint_is_refused(tmp_path):
    checkpoint(tmp_path / "base")
    names = jlora.peft.infer_names(PARAMS, tmp_path / "base")
    with pytest.raises(ValueError, match="is inside the checkpoint"):
        jlora.hf.save_merged(tmp_path / "base" / "merged", PARAMS, names, like=tmp_path / "base")
    assert sorted(entry.name for entry in (tmp_path / "base").iterdir()) == ["config.json", "model.safetensors"]
