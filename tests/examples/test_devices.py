"""The examples of many devices: one loss for all of them, meshes that do not fit, and processes that are lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import devices
import jlora
import train_multiprocess
import train_pmap
import train_sharded
import training
from tests.support.compiler import FLAGS
from tests.support.processes import free_port

TINY = ["--tiny", "--steps=6", "--batch=16", "--lr=0.03"]
ENV = {**os.environ, "XLA_FLAGS": FLAGS, "PYTHONUNBUFFERED": "1"}  # one device


def run(script: Any, *more: str) -> list[float]:
    """The losses of a script, whose libraries promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return script.train(script.arguments([*TINY, *more]))


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Those of the main job's own loop, on one device."""
    options = train_pmap.arguments(TINY)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        job = devices.job(options)
        start = {"adapter": job.init(), "head": job.head}
        settings = {"name": "", "learning_rate": options.lr, "steps": options.steps, "batch": options.batch}
        _, history = training.fit(job.logits, start, job.variables, job.train, None, **settings)
    assert abs(history.losses[-1] - history.losses[0]) > 1e-2, "nothing is learnt: nothing is compared"
    return history.losses


def test_replicas_have_the_losses_of_one_device(losses: list[float]) -> None:
    assert np.allclose(run(train_pmap), losses, rtol=1e-5)


@pytest.mark.parametrize("more", [["--mesh=4x2"], ["--mesh=2x4", "--accumulate=4", "--keep=low-rank"]], ids=" ".join)
def test_meshes_have_the_losses_of_one_device(losses: list[float], more: list[str]) -> None:
    """Batches in parts, and layers that are computed again, too."""
    assert np.allclose(run(train_sharded, *more), losses, rtol=1e-5)


def test_what_is_divided_lies_in_pieces() -> None:
    """Weights, factors and the optimiser's moments, from the first step on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        job = devices.job(train_pmap.arguments(TINY))
        variables, trainable, state = devices.Layout.of(job, devices.mesh("4x2"), 16, 1).start(job)
    down = variables["params"]["layer_0"]["feed_forward"]["down"]["kernel"]
    assert down.addressable_shards[0].data.shape == (32 // 2, 16 // 4)
    moments = [a for a in jax.tree.leaves(state) if a.shape == (32, 8)]
    factor = trainable["adapter"]["params/layer_0/feed_forward/down/kernel"].factors["a"]
    assert factor.shape == (32, 8)
    assert {a.addressable_shards[0].data.shape for a in (factor, *moments)} == {(32 // 2, 8)}
    assert len(moments) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--mesh=1x8"],
            r"axis 1 of params/layer_0/attention/query/kernel has size 4, and the mesh 1x8 divides it by 8",
        ),
        (["--mesh=8x1", "--accumulate=4"], r"axis 0 of a batch's part has size 4, and the mesh 8x1 divides it by 8"),
        (["--mesh=8x1", "--accumulate=3"], r"--accumulate 3 does not divide --batch 16"),
        (["--mesh=3x2"], r"The mesh 3x2 has 6 devices, and there are 8"),
        (["--mesh=8"], r"two numbers such as 4x2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mesh_that_does_not_fit(more: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.Layout, "start", lambda *_: pytest.fail("work began"))
    with pytest.raises(devices.LayoutError, match=message):
        run(train_sharded, *more)


def test_replicas_that_do_not_divide_a_batch() -> None:
    with pytest.raises(devices.LayoutError, match="8 devices with --accumulate 4 do not divide --batch 16"):
        run(train_pmap, "--accumulate=4")


def command(folder: Path, *more: str) -> list[str]:
    options = ["--processes=2", "--devices=2", "--mesh=2x2", "--every=2", f"--folder={folder}"]
    return [sys.executable, train_multiprocess.__file__, *TINY, *options, *more]


def kept(folder: Path) -> list[np.ndarray]:
    """Adapter, head and optimiser state of the last step, read on other devices than they were saved on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        job = devices.job(train_pmap.arguments(TINY))
        variables, trainable, state = devices.Layout.of(job, devices.mesh("4x2"), 16, 1).start(job)
    rest = jlora.load_state(folder / "6", {"head": trainable["head"], "optimiser": state, "step": 0})
    assert rest["step"] == 6
    return [np.asarray(leaf) for leaf in jax.tree.leaves((jlora.load(folder / "6", params=variables), rest))]


@pytest.mark.nightly
def test_processes_and_one_that_is_lost(losses: list[float], tmp_path: Path) -> None:
    """A run as a cluster starts it, of which one process is killed; and the same run again, started by one command.

    The survivor says what happened and ends. What the second run leaves has the bits of a run that nobody stopped.
    """
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    address = f"--coordinator=localhost:{free_port()}"
    pipes: dict[str, Any] = {"env": ENV, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command(killed, address, f"--process-id={k}"), **pipes) for k in range(2)]
    first = []
    assert pair[0].stdout is not None
    for line in pair[0].stdout:
        first.append(line)
        if line.startswith("step 5 "):
            pair[1].send_signal(signal.SIGKILL)
            break
    rest, error = pair[0].communicate(timeout=200)
    pair[1].communicate()
    assert pair[0].returncode == 1, error
    assert re.search(r"error: another process was lost. All until step [24] is kept: start all processes", error)

    runs = [subprocess.run(command(f), env=ENV, capture_output=True, text=True, timeout=300) for f in (killed, whole)]
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    before, after, straight = (
        dict(re.findall(r"step (\d+) loss (\S+)", out))
        for out in ("".join(first) + rest, *(run.stdout for run in runs))
    )
    assert "5" in before.keys() & after.keys(), "no step was done twice"
    assert min(map(int, after)) > 2
    assert before | after == after | before == straight
    assert np.allclose([float(loss) for _, loss in sorted(straight.items())], losses, rtol=1e-5)
    resumed, expected = kept(killed), kept(whole)
    assert len(resumed) == len(expected) > 30
    assert all(a.tobytes() == b.tobytes() for a, b in zip(resumed, expected, strict=True))


def test_a_process_that_ends_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "40").mkdir()
    ends = ["import time; time.sleep(60)", "import os; os.kill(os.getpid(), 9)"]
    started = [subprocess.Popen([sys.executable, "-c", code]) for code in ends]
    assert train_multiprocess.watch(started, tmp_path) == 1
    assert [process.returncode for process in started] == [-9, -9]
    assert "process 1 (exit code -9) was lost. All until step 40 is kept: start" in capfd.readouterr().err
    told = [subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])]
    assert train_multiprocess.watch(told, tmp_path) == 2
    assert not capfd.readouterr().err
