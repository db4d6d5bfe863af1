"""Types of PEFT that share arrays or read the weight, against what `golden/peft_types.py` recorded."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from tests.support import peft_types
from tests.support.recorded import sections

GOLDEN = sections(Path(__file__).parents[1] / "golden" / "peft_types.npz")
STATE, X = GOLDEN["model"]["all"], GOLDEN["input"]["all"]["x"]
PARAMS = peft_types.params_of(STATE)
SITES = peft_types.sites_of(PARAMS)
FILES = ("adapter_config.json", "adapter_model.safetensors")


def unpack(section: str, name: str, folder: Path) -> np.ndarray:
    """Writes the recorded files; returns the recorded output."""
    folder.mkdir()
    for file in FILES:
        (folder / file).write_bytes(GOLDEN[section][name][file].tobytes())
    return GOLDEN[section][name]["y"]


def some(section: str) -> list:
    default = ("tinylora", "unilora")
    return [pytest.param(name, marks=[] if name in default else [pytest.mark.nightly]) for name in GOLDEN[section]]


@pytest.mark.parametrize("name", some("adapter"))
def test_a_file_of_peft_computes_what_it_does_there_and_is_written_again(name, tmp_path):
    want = unpack("adapter", name, tmp_path / "given")
    adapter = jlora.peft.load(tmp_path / "given", SITES, peft_types.NAMES, params=PARAMS)
    for shared in adapter["out/kernel"].method.shared_arrays:
        held = [shared in {**update.factors, **update.frozen} for _, update in sorted(adapter.items())]
        assert held == [True, False]
    np.testing.assert_allclose(jlora.adapt(peft_types.apply)(PARAMS, adapter, X), want, atol=2e-5)
    assert jlora.peft.save(tmp_path / "saved", adapter, peft_types.NAMES, params=PARAMS) == ()
    given, saved = (load_file(tmp_path / folder / FILES[1]) for folder in ("given", "saved"))
    if name != "vblora_topk":  # of whose logits the file holds those of the mixed vectors alone
        assert given.keys() == saved.keys()
        assert all(np.array_equal(given[key], saved[key]) for key in given)
    again = jlora.peft.load(tmp_path / "saved", SITES, peft_types.NAMES, params=PARAMS)
    first, second = (jlora.merge(PARAMS, a)["out"]["kernel"] for a in (adapter, again))
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("name", some("export"))
def test_an_adapter_is_written_as_peft_has_read_it(name, tmp_path):
    want = unpack("export", name, tmp_path / "given")
    adapter = peft_types.save(name, tmp_path / "saved", STATE)
    given, saved = (load_file(tmp_path / folder / FILES[1]) for folder in ("given", "saved"))
    assert given.keys() == saved.keys()
    for key in given:
        np.testing.assert_allclose(saved[key], given[key], atol=1e-5)
    first, second = (json.loads((tmp_path / folder / FILES[0]).read_text()) for folder in ("given", "saved"))
    assert first == second
    np.testing.assert_allclose(jlora.adapt(peft_types.apply)(PARAMS, adapter, X), want, atol=2e-5)


def test_what_peft_cannot_share_is_written_as_lora(tmp_path):
    """Two groups, a scale, or an offset: PEFT shares one array among all modules and has no scale."""
    targets = {"layers/kernel": jlora.VBLoRA(2, 5, 4, group="a"), "out/kernel": jlora.VBLoRA(2, 5, 4, group="b")}
    adapter = jlora.init(jnp.zeros(2, jnp.uint32), SITES, targets)
    notes = jlora.peft.save(tmp_path / "groups", adapter, peft_types.NAMES)
    assert len(notes) == 2
    loaded = jlora.peft.load(tmp_path / "groups", SITES, peft_types.NAMES)
    for path in ("layers", "out"):
        merged = [jlora.merge(PARAMS, a)[path]["kernel"] for a in (adapter, loaded)]
        np.testing.assert_allclose(*merged, atol=1e-6)
