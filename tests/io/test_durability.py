"""Checkpoints under force: killed processes, full disks, folders that cannot be written, damaged files."""

import faulthandler
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

import jlora
from tests.support import disk_failures, kill_worker, toy_model
from tests.support.checkpoints import GOLDEN, same, varied

KILLS = 50


@pytest.mark.nightly
def test_a_killed_save_leaves_the_last_complete_one(tmp_path):
    """At every kill, what is at a path is whole, and what was there before still is."""
    command = [sys.executable, "-m", kill_worker.__name__, str(tmp_path), str(KILLS), "0"]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    interrupted = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        visible = sorted(int(found.name) for found in folder.iterdir() if found.name.isdigit())
        interrupted += any("tmp" in found.name for found in folder.iterdir())
        if number % 2:
            with ocp.CheckpointManager(folder) as manager:
                assert manager.all_steps() == visible
            assert jlora.load_state(folder / str(visible[-1]), {"step": 0}) == {"step": visible[-1]}
        else:
            assert visible == list(range(visible[-1] + 1))
        for step in visible[-2:]:
            loaded = jax.device_get(jlora.load(folder / str(step)))
            same(loaded, kill_worker.adapter(step))
    assert interrupted >= KILLS // 4  # else the kills came between the saves


@pytest.fixture(scope="module")
def failures():
    """What came of saves that could not succeed; the folder is one that other users may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-m", disk_failures.__name__, name], check=True, capture_output=True, text=True
        )
        yield folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_full_disk(failures):
    folder, (before, full, _, again) = failures
    assert before == {"raised": "", "there": ["before"]}
    assert f"could not be written to {folder / 'full'}, and nothing was left there" in full["raised"]
    assert "File too large" in full["raised"]
    assert full["there"] == ["before"]
    assert again == {"raised": "", "there": ["before", "full"]}
    same(jlora.load(folder / "before"), toy_model.adapter())
    same(jlora.load(folder / "full"), toy_model.adapter())


def test_a_read_only_folder(failures):
    _, (*_, read_only, _) = failures
    assert "could not be written" in read_only["raised"]
    assert "Permission denied" in read_only["raised"]
    assert read_only["there"] == ["before"]


@pytest.fixture(scope="module")
def managed(tmp_path_factory):
    """An adapter with its base as Orbax's manager writes it, which is compressed."""
    folder = tmp_path_factory.mktemp("managed")
    with ocp.CheckpointManager(folder) as manager:
        items = jlora.checkpoint_args(varied(), {"step": 1}, params=toy_model.params())
        manager.save(0, args=ocp.args.Composite(**items))
    return folder / "0"


def spans(content: bytes, size: int = 64) -> list[tuple[int, int]]:
    """All regions of a file."""
    return [(at, min(at + size, len(content))) for at in range(0, len(content), size)]


def flip(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    at = rng.randrange(start, stop)
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def other(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:start] + rng.randbytes(stop - start) + content[stop:]


def zero(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:start] + bytes(stop - start) + content[stop:]


def drop(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:start] + content[stop:]


def twice(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:stop] + content[start:]


def cut(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[: rng.randrange(start, stop)]


def digit(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    """Another digit in place of one, which keeps JSON what it is."""
    places = [at for at in range(start, stop) if chr(content[at]).isdigit()] or [start]
    at = rng.choice(places)
    return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]


MUTATIONS = [flip, other, zero, drop, twice, cut, digit]


def load_or_refuse(folder) -> int:
    """Loads what was saved or raises what is documented, and soon; says whether it was refused."""
    began = time.perf_counter()
    try:
        loaded = jlora.load(folder)
    except jlora.CheckpointError:
        return 1
    finally:
        assert time.perf_counter() - began < 10
    same(loaded, varied())
    return 0


@pytest.mark.parametrize("kind", ["1", "2", "managed"])
@pytest.mark.parametrize("rounds", [1, pytest.param(15, marks=pytest.mark.nightly)])
def test_every_region_of_every_file_may_be_damaged(tmp_path, managed, kind, rounds):
    """By default every region is damaged once, in one of the ways; nightly fifteen times."""
    source = managed if kind == "managed" else GOLDEN / kind
    shutil.copytree(source, tmp_path / "a")
    rng = random.Random(f"{kind} {rounds}")
    cases = refused = 0
    faulthandler.dump_traceback_later(600, exit=True)
    for file in sorted(found for found in (tmp_path / "a").rglob("*") if found.is_file()):
        content = file.read_bytes()
        for start, stop in spans(content):
            for _ in range(rounds):
                mutation = rng.choice(MUTATIONS)
                file.write_bytes(mutation(content, start, stop, rng))
                cases += 1
                refused += load_or_refuse(tmp_path / "a")
        file.write_bytes(content)
    faulthandler.cancel_dump_traceback_later()
    assert not load_or_refuse(tmp_path / "a")
    assert cases >= 100 * rounds
    assert refused >= cases // 4


@pytest.mark.parametrize("kind", ["1", "2", "managed"])
def test_files_that_are_gone_empty_or_others(tmp_path, managed, kind):
    source = managed if kind == "managed" else GOLDEN / kind
    names = sorted(found.relative_to(source) for found in source.rglob("*") if found.is_file())
    refused = 0
    for k, name in enumerate(names):
        for damage in ("gone", "empty", "other", "folder"):
            folder = tmp_path / f"{k}-{damage}"
            shutil.copytree(source, folder)
            (folder / name).unlink()
            if damage == "empty":
                (folder / name).touch()
            elif damage == "other":
                shutil.copy(source / names[k - 1], folder / name)
            elif damage == "folder":
                (folder / name).mkdir()
            refused += load_or_refuse(folder)
            shutil.rmtree(folder)
    assert refused >= 4 * 3


def test_a_state_that_was_damaged(tmp_path, managed):
    """The state's plain values stand in the description, which has a sum of its own."""
    shutil.copytree(managed, tmp_path / "a")
    file = tmp_path / "a" / "jlora" / "metadata"
    file.write_text(file.read_text().replace('"value": 1}', '"value": 2}'))
    with pytest.raises(jlora.CheckpointError, match="altered"):
        jlora.load_state(tmp_path / "a", {"step": 0})
