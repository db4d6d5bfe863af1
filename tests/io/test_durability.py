"""Checkpoints after failures: killed processes, full disks, folders without permission to write, damaged files."""

import faulthandler
import json
import random
import shutil
import subprocess
import sys
import tempfile
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
    """After every kill, each checkpoint at its final path is complete, and earlier ones are still there."""
    command = [sys.executable, "-m", kill_worker.__name__, str(tmp_path), str(KILLS), "0"]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    interrupted = 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        visible = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        interrupted += any("tmp" in path.name for path in folder.iterdir())
        if number % 2:
            with ocp.CheckpointManager(folder) as manager:
                assert manager.all_steps() == visible
            assert jlora.load_state(folder / str(visible[-1]), {"step": 0}) == {"step": visible[-1]}
        else:
            assert visible == list(range(visible[-1] + 1))
        for step in visible[-2:]:
            loaded = jax.device_get(jlora.load(folder / str(step)))
            same(loaded, kill_worker.adapter(step))
    assert interrupted >= KILLS // 4  # otherwise the kills came between the saves and tested nothing


@pytest.fixture(scope="module")
def failures():
    """Results of saves that cannot succeed. Other users may enter the folder, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        run = subprocess.run(
            [sys.executable, "-m", disk_failures.__name__, name], check=True, capture_output=True, text=True
        )
        yield folder, [json.loads(line) for line in run.stdout.splitlines()]


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
def checkpoints(tmp_path_factory):
    """Folders of the same adapter: earlier formats, Orbax's manager (compressed), and zarr 3 in plain files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    items = jlora.checkpoint_args(varied(), {"step": 1}, params=toy_model.params())
    with ocp.CheckpointManager(folder / "managed") as manager:
        manager.save(0, args=ocp.args.Composite(**items))
    arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_ocdbt=False, use_compression=False)
    handler = ocp.CompositeCheckpointHandler(arrays=arrays, jlora=ocp.JsonCheckpointHandler())
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "zarr3_files", args=ocp.args.Composite(**items))
    new = {"managed": folder / "managed" / "0", "zarr3_files": folder / "zarr3_files"}
    return {name: GOLDEN / name for name in FORMATS} | new


FORMATS = sorted(path.name for path in GOLDEN.iterdir() if path.name.isdecimal())  # folders of the adapter `varied`
KINDS = [*FORMATS, "managed", "zarr3_files"]


def spans(content: bytes, size: int = 64) -> list[tuple[int, int]]:
    """Divides a file into spans of 64 bytes."""
    return [(start, min(start + size, len(content))) for start in range(0, len(content), size)]


def flip_bit(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    at = rng.randrange(start, stop)
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def randomize(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:start] + rng.randbytes(stop - start) + content[stop:]


def fill_with_zeros(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:start] + bytes(stop - start) + content[stop:]


def remove(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:start] + content[stop:]


def repeat(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[:stop] + content[start:]


def truncate(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    return content[: rng.randrange(start, stop)]


def change_digit(content: bytes, start: int, stop: int, rng: random.Random) -> bytes:
    """Replaces a digit by another, so that JSON stays valid."""
    digits = [at for at in range(start, stop) if chr(content[at]).isdigit()] or [start]
    at = rng.choice(digits)
    return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]


MUTATIONS = [flip_bit, randomize, fill_with_zeros, remove, repeat, truncate, change_digit]


def is_refused(folder) -> bool:
    """Whether loading raises the documented error; if it does not, the values must be those saved."""
    try:
        loaded = jlora.load(folder)
    except jlora.CheckpointError:
        return True
    same(loaded, varied())
    return False


@pytest.mark.drawn(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [1, pytest.param(15, marks=pytest.mark.nightly)])
def test_every_span_of_every_file_is_damaged(tmp_path, checkpoints, kind, rounds):
    """By default every span is damaged once, by a random mutation; nightly fifteen times."""
    folder = tmp_path / "a"
    shutil.copytree(checkpoints[kind], folder)
    rng = random.Random(f"{kind} {rounds}")
    cases = refused = 0
    faulthandler.dump_traceback_later(600, exit=True)  # a load that does not end is a failure
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for start, stop in spans(content):
            for _ in range(rounds):
                file.write_bytes(rng.choice(MUTATIONS)(content, start, stop, rng))
                cases += 1
                refused += is_refused(folder)
        file.write_bytes(content)
    faulthandler.cancel_dump_traceback_later()
    assert not is_refused(folder)
    assert cases >= 100 * rounds
    assert refused >= cases // 4


@pytest.mark.drawn(2)
@pytest.mark.parametrize("kind", [*KINDS[:-1], pytest.param(KINDS[-1], marks=pytest.mark.nightly)])  # many files
def test_files_that_are_missing_empty_or_replaced(tmp_path, checkpoints, kind):
    source = checkpoints[kind]
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    refused = 0
    for k, name in enumerate(names):
        for damage in ("missing", "empty", "replaced", "folder"):
            folder = tmp_path / f"{k}-{damage}"
            shutil.copytree(source, folder)
            (folder / name).unlink()
            if damage == "empty":
                (folder / name).touch()
            elif damage == "replaced":
                shutil.copy(source / names[k - 1], folder / name)
            elif damage == "folder":
                (folder / name).mkdir()
            refused += is_refused(folder)
            shutil.rmtree(folder)
    assert refused >= 4 * 3


def test_a_damaged_state(tmp_path, checkpoints):
    """Plain values of the state are in the metadata, which have a checksum of their own."""
    shutil.copytree(checkpoints["managed"], tmp_path / "a")
    file = tmp_path / "a" / "jlora" / "metadata"
    file.write_text(file.read_text().replace('"value": 1}', '"value": 2}'))
    with pytest.raises(jlora.CheckpointError, match="altered"):
        jlora.load_state(tmp_path / "a", {"step": 0})
