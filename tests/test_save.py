"""Adapters on disk: exact, self-describing, and refused when damaged."""

import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests import small


@pytest.fixture
def saved(tmp_path):
    adapter = small.adapter()
    jlora.save(tmp_path / "a", adapter)
    return tmp_path / "a", adapter


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", [jlora.LoRA(rank=2, alpha=3.0, dropout=0.1), jlora.Full()], ids=repr)
def test_round_trip(tmp_path, dtype, method):
    made = jlora.init(jax.random.key(0), small.sites(), {"mix/kernel|embed|layers/up": method}, dtype=dtype)
    adapter = small.nonzero(made)
    jlora.save(tmp_path / "a", jlora.with_dropout(adapter, jax.random.key(1)))
    loaded = jlora.load(str(tmp_path / "a"))
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(loaded), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_it_describes_itself(saved):
    meta = json.loads((saved[0] / "jlora" / "metadata").read_text())
    assert meta["format"] == 1
    assert set(meta["versions"]) == {"jlora", "jax", "orbax-checkpoint"}
    said = meta["updates"]["layers/up"]
    assert said["method"] == "LoRA"
    assert said["hyperparameters"]["rank"] == 2
    assert said["hyperparameters"]["alpha"] == 3.0
    assert said["roles"] == ["stack", "in", "out"]


def test_only_the_adapter_is_stored(tmp_path):
    size = 512
    sites = jlora.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((size, size))}, jnp.ones((1, size)))
    jlora.save(tmp_path / "a", small.nonzero(jlora.init(jax.random.key(0), sites, jlora.LoRA(rank=16))))
    stored = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert stored <= 1.05 * 2 * size * 16 * 4 + 64 * 1024


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved adapter at .*nowhere"):
        jlora.load(tmp_path / "nowhere")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(jlora.CheckpointError, match="no saved adapter"):
        jlora.load(tmp_path)


def test_nothing_is_overwritten(saved):
    with pytest.raises(FileExistsError, match="exists"):
        jlora.save(saved[0], saved[1])
    with pytest.raises(ValueError, match="empty"):
        jlora.save(saved[0].parent / "b", {})


# Orbax leaves reads running when one of them fails; they end after its event loop has been closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_truncated_or_altered_file_is_noticed(saved):
    """Any file that `load` reads, cut in half or with one byte flipped, raises or changes nothing."""
    folder, adapter = saved
    noticed = 0
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        content = file.read_bytes()
        half = len(content) // 2
        for damaged in (
            (content[:half], content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]) if content else ()
        ):
            file.write_bytes(damaged)
            try:
                loaded = jlora.load(folder)
            except jlora.CheckpointError:
                noticed += 1
                continue
            assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
            for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(loaded), strict=True):
                assert np.array_equal(a, b)
        file.write_bytes(content)
    assert noticed >= 4  # the arrays' and the description's own files at the least


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format=2), "format 2"),
        (lambda meta: meta["updates"]["mix/kernel"]["hyperparameters"].update(alpha=4.0), "altered"),
        (lambda meta: meta.pop("format"), "damaged"),
    ],
)
def test_an_altered_description(saved, change, message):
    file = saved[0] / "jlora" / "metadata"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))
    with pytest.raises(jlora.CheckpointError, match=message):
        jlora.load(saved[0])


def test_a_killed_save_leaves_nothing_half_written(tmp_path):
    """A process that is killed while it saves leaves a whole adapter or none at the path."""
    code = (
        "import jax, jlora, sys, itertools\n"
        "from tests import small\n"
        "a = small.adapter()\n"
        "print('ready', flush=True)\n"
        "for k in itertools.count():\n"
        "    jlora.save(f'{sys.argv[1]}/{k}', a)\n"
    )
    for wait in (0.05, 0.21):
        folder = tmp_path / str(wait)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        with process.stdout as out:
            assert out.readline() == b"ready\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        process.wait()
        whole = sorted((found for found in folder.glob("*") if found.name.isdigit()), key=lambda f: int(f.name))
        for found in whole[-2:]:
            assert set(jlora.load(found)) == set(small.adapter())
