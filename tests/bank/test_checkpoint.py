"""Banks on disk: whole and by member, PEFT files, kills and damage."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jlora
from tests.support import kill_worker, toy_model

KILLS = 3


def bank() -> jlora.bank.Bank:
    ranks = {"films": 1, "tweets": 3}
    members = {name: toy_model.adapter(jlora.LoRA(rank, alpha=5.0), rank) for name, rank in ranks.items()}
    return jlora.bank.stack(members | {"one": {"mix/kernel": members["films"]["mix/kernel"]}, "none": {}})


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_round_trip(tmp_path: Path) -> None:
    saved = bank()
    jlora.bank.save(tmp_path / "bank", saved, params=toy_model.params())
    assert jlora.bank.names(tmp_path / "bank") == ["films", "tweets", "one", "none"]
    assert_same(jlora.bank.load(tmp_path / "bank"), saved)
    assert_same(jlora.bank.load(tmp_path / "bank", params=toy_model.params()), saved)
    for name in saved:
        assert_same(jlora.bank.load_member(tmp_path / "bank", name), saved[name])


def test_a_saved_bank_is_replaced(tmp_path: Path) -> None:
    jlora.bank.save(tmp_path, bank())
    second = jlora.bank.stack({"a": toy_model.adapter(seed=4)})
    jlora.bank.save(tmp_path, second)
    assert_same(jlora.bank.load(tmp_path), second)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_other_methods(tmp_path: Path) -> None:
    """Members in the form of their own method, trained in the bank."""
    members = {str(k): toy_model.adapter(jlora.DoRA(2, alpha=3.0), k) for k in range(2)}
    saved = jlora.bank.stack(members)
    jlora.bank.save(tmp_path, saved)
    loaded = jlora.bank.load(tmp_path)
    for name, member in members.items():
        want = jlora.adapt(toy_model.model)(toy_model.params(), member, toy_model.tokens())
        got = jlora.adapt(toy_model.model)(toy_model.params(), loaded[name], toy_model.tokens())
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5)


def test_a_member_as_a_peft_file(tmp_path: Path) -> None:
    """A member goes out as a PEFT file of its own rank, and comes in again."""
    path, params = "mix/kernel", toy_model.params()
    member = jlora.bank.stack({"a": {path: toy_model.adapter(jlora.LoRA(2, alpha=5.0))[path]}}, rank=4)["a"]
    names = {path: "mix.weight"}
    jlora.peft.save(tmp_path / "peft", member, names)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 5.0)
    sites = toy_model.sites()
    again = jlora.bank.stack({"b": jlora.peft.load(tmp_path / "peft", sites, names)}, rank=4)
    want = jlora.merge(params, member)["mix"]["kernel"]
    np.testing.assert_allclose(jlora.merge(params, again["b"])["mix"]["kernel"], want, rtol=1e-6)


def test_a_damaged_member(tmp_path: Path) -> None:
    """The others load, and the error names the one that does not."""
    saved = bank()
    jlora.bank.save(tmp_path, saved)
    place = json.loads((tmp_path / "bank.json").read_text())["members"]["tweets"]
    for file in (tmp_path / place / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(bytes(b ^ 0xFF for b in file.read_bytes()))
    with pytest.raises(jlora.CheckpointError, match=r"(?s)1 of 4 members .*load_member.*tweets: "):
        jlora.bank.load(tmp_path)
    with pytest.raises(jlora.CheckpointError):
        jlora.bank.load_member(tmp_path, "tweets")
    assert_same(jlora.bank.load_member(tmp_path, "films"), saved["films"])


def test_folders_that_hold_no_bank(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no saved bank"):
        jlora.bank.load(tmp_path / "nothing")
    jlora.save(tmp_path / "adapter", toy_model.adapter())
    with pytest.raises(jlora.CheckpointError, match=r"no complete bank.*bank.json"):
        jlora.bank.load(tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="holds no bank"):
        jlora.bank.save(tmp_path / "adapter", bank())
    jlora.bank.save(tmp_path / "bank", bank())
    with pytest.raises(KeyError, match=r"no adapter 'film'.*films"):
        jlora.bank.load_member(tmp_path / "bank", "film")
    index = tmp_path / "bank" / "bank.json"
    index.write_text(json.dumps({"format": 99, "members": {}}))
    with pytest.raises(jlora.CheckpointError, match="format 99; this release reads 1"):
        jlora.bank.load(tmp_path / "bank")
    index.write_text("{")
    with pytest.raises(jlora.CheckpointError, match="missing or damaged"):
        jlora.bank.load(tmp_path / "bank")


def test_a_killed_save_leaves_a_complete_bank(tmp_path: Path) -> None:
    """After every kill the folder holds one bank, whole, whose two members are of one save; the next save works."""
    command = [sys.executable, "-m", kill_worker.__name__, str(tmp_path), str(KILLS), "0", "bank"]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    unfinished = 0
    for number in range(KILLS):
        folder = tmp_path / str(number) / "bank"
        unfinished += len([path for path in folder.iterdir() if path.is_dir()]) > 1
        loaded = jlora.bank.load(folder)
        first, second = (float(loaded[name]["first"]["a"][0, 0]) for name in ("x", "y"))
        assert second == 2 * first - 1
        assert (loaded["y"]["second"]["b"] == -second).all()
        jlora.bank.save(folder, bank())
        assert_same(jlora.bank.load(folder), bank())
        assert len(list(folder.iterdir())) == 2
    assert unfinished  # otherwise the kills came between the saves and tested nothing
