"""`jlora.info` and `python -m jlora info`: what files hold, against merged weights, and what would be refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.__main__ import main
from jlora.io.torch.pickled import load_state
from tests.support import toy_model
from tests.support.peft_exports import EXPORTS
from tests.support.peft_files import change_configuration, change_tensors, golden, program, unpack
from tests.support.peft_models import MODELS

LORALIB = Path(__file__).parents[1] / "golden" / "loralib.pt"
FILES = [f"adapter/{name}" for name in golden()["adapter"]] + [f"export/{name}" for name in EXPORTS]
DEFAULT = ("adapter/mixtral experts", "adapter/bert lokr_whole")


def unpacked(name: str, folder: Path) -> tuple[Path, str]:
    """A recorded file of PEFT in a folder, and the model that it is for."""
    section, key = name.split("/")
    return unpack(golden()[section][key], folder), key.split()[0] if section == "adapter" else EXPORTS[key].model


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.nightly) for n in FILES])
def test_norms_are_those_of_the_merged_weights(tmp_path, name):
    folder, model = unpacked(name, tmp_path / "a")
    report = jlora.info(folder)
    updates = report.adapters[""].updates
    params, sites, _ = program(model)
    if report.refused:
        with pytest.raises(ValueError, match=r"start=folder"):
            jlora.peft.load(folder, sites, MODELS[model].names, params=params)
        assert all("start=folder" in reason for reason in report.refused)
        return
    adapter = jlora.peft.load(folder, sites, MODELS[model].names, params=params)
    difference = jax.tree.map(np.subtract, jlora.merge(params, adapter), params)
    if any("the bias of the module" in note for note in report.notes):  # which is no update of its own
        is_bias = jax.tree_util.tree_map_with_path(lambda path, _: "bias" in jax.tree_util.keystr(path), difference)
        difference = jax.tree.map(lambda leaf, bias: 0 * leaf if bias else leaf, difference, is_bias)
    if all(update.norm is not None for update in updates):
        norm = math.hypot(*(u.norm or 0.0 for u in updates if u.path != "lm_head" or "tied" not in MODELS[model].torch))
        expected = math.hypot(*(float(np.linalg.norm(np.ravel(leaf))) for leaf in jax.tree.leaves(difference)))
        np.testing.assert_allclose(norm, expected, 1e-5)
    else:
        methods = {type(update.method).__name__ for update in updates if update.norm is None}
        follows_from_base = any("the update follows from the base" in note for note in report.notes)
        assert methods <= {"DoRA", "VeRA", "IA3", "Full", *(["LoRA"] if follows_from_base else [])}


def test_rows_of_a_file_of_peft(tmp_path):
    """Written down by hand from the configuration of the file."""
    report = jlora.info(unpack(golden()["adapter"]["bert patterns"], tmp_path / "a"))
    assert report.format == "PEFT"
    at = "encoder.layer.{}.attention.self.{}".format
    rows = [(u.path, u.method, u.shape, u.numbers, u.bytes) for u in report.adapters[""].updates]
    assert rows == [
        (at(0, "query"), jlora.LoRA(3, 7.0), (16, 16), 96, 384),
        (at(1, "key"), jlora.LoRA(4, 5.0), (16, 16), 128, 512),
        (at(1, "query"), jlora.LoRA(2, 5.0), (16, 16), 64, 256),
    ]


def test_layers_that_are_alike_share_a_row(tmp_path):
    text = str(jlora.info(unpack(golden()["adapter"]["bert lora"], tmp_path / "a")))
    assert "encoder.layer.{0,1}.attention.self.query  " in text
    assert text.startswith(f"{tmp_path / 'a'}: PEFT\npath ")


def test_a_checkpoint_and_a_bank(tmp_path):
    """A member of the bank that is damaged is named, and the others are listed."""
    adapter = {"mix/kernel": toy_model.adapter()["mix/kernel"]}
    jlora.save(tmp_path / "one", adapter, params=toy_model.params())
    report = jlora.info(tmp_path / "one")
    assert (report.format, report.adapters[""].updates) == ("checkpoint of jlora", jlora.summary(adapter).updates)
    assert (report.refused, report.notes) == ((), ())
    jlora.bank.save(tmp_path / "bank", jlora.bank.stack({"english": adapter, "none": {}, "greek": adapter}))
    place = json.loads((tmp_path / "bank" / "bank.json").read_text())["members"]["greek"]
    (tmp_path / "bank" / place / "jlora" / "metadata").write_text("{")
    bank = jlora.info(tmp_path / "bank")
    assert bank.format == "bank of jlora"
    assert {name: s.updates for name, s in bank.adapters.items()} == {
        "english": report.adapters[""].updates,
        "none": (),
    }
    assert [sentence.split(":")[0] for sentence in bank.refused] == ["greek"]
    assert "english  LoRA " in str(bank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"r": 2}, r"encoder.layer.0.attention.self.query: its tensors have the shapes .*LoRA\(rank=2"),
        ({"use_dora": True}, r"query: DoRA: missing \['lora_magnitude_vector'\], left over \[\]"),
        (lambda t: {k: v for k, v in t.items() if "0.attention.self.query.lora_B" not in k}, "query: LoRA: missing"),
        (lambda t: t.update({"other": np.ones(3, np.float32)}), "the tensor other, and all of PEFT's start with"),
    ],
)
def test_what_would_be_refused(given_files, change: Any, message):
    """`jlora.peft.load` refuses the same files, see test_peft_errors.py."""
    if isinstance(change, dict):
        change_configuration(given_files, **change)
    else:
        change_tensors(given_files, change)
    report = jlora.info(given_files)
    assert any(re.search(message, sentence) for sentence in report.refused)


def test_tensors_without_their_configuration(given_files):
    (given_files / "adapter_config.json").unlink()
    report = jlora.info(given_files / "adapter_model.safetensors")
    assert "adapter_config.json is not beside the file" in report.refused[0]


def test_a_state_dict_of_loralib():
    """`golden/loralib.pt` was written by torch: a linear layer, and one with two of three groups, each of rank 2."""
    report = jlora.info(LORALIB)
    rows = [(u.path, u.rank, u.shape, u.numbers) for u in report.adapters[""].updates]
    assert (report.format, rows) == ("loralib", [("0", 2, (6, 4), 20), ("1", 2, (4, 4), 24)])
    state = load_state(LORALIB)
    norm = report.adapters[""].updates[0].norm
    assert norm is not None
    np.testing.assert_allclose(norm, np.linalg.norm(state["0.lora_B"] @ state["0.lora_A"]), 1e-5)
    assert "1 is a MergedLinear with 2 enabled groups." in report.notes
    for name, value in state.items():  # as golden/kohya.py draws them
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        np.testing.assert_array_equal(value, np.asarray(0.3 * rng.normal(size=value.shape), np.float32))


def test_a_state_dict_of_another_library(tmp_path):
    """Of files of torch.save jlora reads loralib's alone."""
    with zipfile.ZipFile(LORALIB) as given, zipfile.ZipFile(tmp_path / "a.pt", "w") as changed:
        for name in given.namelist():
            changed.writestr(name, given.read(name).replace(b".lora_", b".down_"))
    with pytest.raises(ValueError, match=r"unknown format\. It is a file of torch\.save"):
        jlora.info(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text", b"a text"),
        ("empty", b""),
        ("zip", b"PK\x03\x04 and no more"),
        ("header", (2**60).to_bytes(8, "little") + b"{"),
        ("short", (50).to_bytes(8, "little") + b'{"a": 1}'),
    ],
)
def test_a_file_that_is_no_adapter(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"unknown format|cannot be read as"):
        jlora.info(tmp_path / name)


def test_a_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="unknown format"):
        jlora.info(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        jlora.info(tmp_path / "none")
    jlora.save(tmp_path / "100", toy_model.adapter())
    with pytest.raises(ValueError, match="holds several checkpoints, 100: name one"):
        jlora.info(tmp_path)
    save_file({"model.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown format\. Its tensors are model\.weight"):
        jlora.info(tmp_path / "model.safetensors")


def test_the_command(given_files, capsys):
    assert main(["info", str(given_files)]) == 0
    assert capsys.readouterr().out == f"{jlora.info(given_files)}\n"
    assert main(["info", "--json", str(given_files)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(jlora.info(given_files).as_json()))
    assert (printed["format"], printed["refused"]) == ("PEFT", [])
    assert printed["adapters"][""]["updates"][0]["hyperparameters"]["alpha"] == 5.0
    change_configuration(given_files, layer_replication=[[0, 1]])
    assert main(["info", str(given_files)]) == 1
    assert "Would be refused:" in capsys.readouterr().out
    assert main(["info", str(given_files / "none"), "--json"]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out)["error"] in output.err


@pytest.mark.nightly
def test_the_command_in_a_shell(tmp_path):
    command = [sys.executable, "-m", "jlora", "info", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown format" in done.stderr
