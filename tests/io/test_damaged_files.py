"""Files of every format with bits flipped, bytes left out, or absurd sizes: they raise a ValueError, or load."""

from __future__ import annotations

import contextlib
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

import jlora
from jlora.io.gguf import container
from jlora.io.torch.pickled import load_state
from tests.support import kohya_files
from tests.support.peft_files import FILES, golden, unpack

LORALIB = Path(__file__).parents[1] / "golden" / "loralib.pt"
PARAMS = {"w": jnp.ones((4, 6))}
SITES = jlora.trace(lambda p, x: x @ p["w"], PARAMS, jnp.ones((2, 4)))
MANY = 60


def lora(kind: str) -> bytes:
    """A LoRA of rank 2 for a weight (out 6, in 4)."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    if kind == "gguf":
        fields = {"general.architecture": "qwen3", "general.type": "adapter", "adapter.type": "lora"}
        tensors = {"blk.0.ffn_up.weight.lora_a": a, "blk.0.ffn_up.weight.lora_b": b}
        return container.pack({**fields, "adapter.lora.alpha": 5.0}, tensors)
    name, alpha = "lora_unet_a_b", np.full((), 5, np.float32)
    fields = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"a.b": 3}}'}
    if kind == "kohya":
        return save({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha})
    if kind == "diffusers":
        return save({"unet.a.b.lora_A.weight": a, "unet.a.b.lora_B.weight": b}, fields)
    c, d = rng.normal(size=(2, 2)).astype(np.float32), rng.normal(size=(3, 2)).astype(np.float32)
    return save({f"{name}.lokr_w1": c, f"{name}.lokr_w2": d, f"{name}.alpha": alpha})


# For every format a file, and how it is read.
READERS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "gguf": (lora("gguf"), lambda file: jlora.gguf.load(file, SITES, {"w": "blk.0.ffn_up"})),
    **{
        kind: (lora(kind), lambda file: jlora.kohya.load(file, SITES, {"w": "unet.a.b"}, params=PARAMS))
        for kind in ("kohya", "diffusers", "lokr")
    },
    "lycoris": (kohya_files.golden()["adapter"]["mixed"]["file"].tobytes(), lambda file: None),
    "loralib": (LORALIB.read_bytes(), load_state),
}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with a bit flipped, cut off, some bytes left out or doubled, or a size of 2^60; mostly in its head."""
    head = min(len(data), 400) if rng.integers(3) else len(data)
    out, at = bytearray(data), int(rng.integers(head))
    match rng.integers(6):
        case 0:
            out[at] ^= 1 << int(rng.integers(8))
        case 1:
            out = out[:at]
        case 2:
            del out[at : at + 1 + int(rng.integers(9))]
        case 3:
            out[at:at] = out[at : at + 1 + int(rng.integers(9))]
        case 4:
            out[at] = int(rng.integers(256))
        case _:
            out[at : at + 8] = struct.pack("<Q", 2 ** int(rng.choice([60, 63, 31])))
    return bytes(out)


def seeds(count: int) -> list[Any]:
    return [0, *(pytest.param(k, marks=pytest.mark.nightly) for k in range(1, count))]


@pytest.mark.parametrize("seed", seeds(30))
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_raise_or_load(tmp_path, name, seed):
    (data, read), rng, file = READERS[name], np.random.default_rng(seed), tmp_path / "a"
    file.write_bytes(data)
    read(file)
    assert not jlora.info(file).refused
    for _ in range(MANY):
        file.write_bytes(damaged(data, rng))
        for one in (read, jlora.info):
            with contextlib.suppress(ValueError):
                one(file)


@pytest.mark.parametrize("seed", seeds(10))
def test_damaged_files_of_peft(tmp_path, seed):
    """`jlora.peft.load` is in test_peft_errors.py."""
    folder, rng = unpack(golden()["adapter"]["bert patterns"], tmp_path / "a"), np.random.default_rng(seed)
    for _ in range(MANY):
        name = FILES[int(rng.integers(2))]
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(damaged(good, rng))
        with contextlib.suppress(ValueError):
            jlora.info(folder)
        (folder / name).write_bytes(good)


def test_json_that_is_nested_too_deep(tmp_path):
    folder = unpack(golden()["adapter"]["bert patterns"], tmp_path / "a")
    (folder / FILES[0]).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        jlora.info(folder)
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        jlora.peft.load(folder, SITES, {"w": "a"})
    shapes = {"unet.a.b.lora_A.weight": (2, 4), "unet.a.b.lora_B.weight": (6, 2)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    (tmp_path / "b.safetensors").write_bytes(save(tensors, {"lora_adapter_metadata": "[" * 100_000}))
    with pytest.raises(ValueError, match="lora_adapter_metadata cannot be read"):
        jlora.kohya.load(tmp_path / "b.safetensors", SITES, {"w": "unet.a.b"})
    assert "cannot be read" in jlora.info(tmp_path / "b.safetensors").refused[0]


def test_a_pickle_runs_nothing(tmp_path):
    """Names other than those of tensors are refused before anything is called."""
    with zipfile.ZipFile(LORALIB) as given, zipfile.ZipFile(tmp_path / "a.pt", "w") as changed:
        for name in given.namelist():
            changed.writestr(name, given.read(name).replace(b"collections\nOrderedDict", b"os\ngetcwd"))
    with pytest.raises(ValueError, match=r"it needs os\.getcwd, and a dict of floating-point tensors does not"):
        load_state(tmp_path / "a.pt")
