"""Files of kohya, LyCORIS and diffusers in jlora, and of jlora in those: the weights that `golden/kohya.py` has."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from tests.support.kohya_files import (
    BOUND,
    EXPORTS,
    Program,
    error,
    exported,
    golden,
    program,
    weights,
    write,
)

LIBRARIES = ("diffusers", "lycoris", "loralib")
OF_ENCODER = r"lora_te_.*"


def kinds(name: str) -> list[str]:
    """The programs that a recorded file is read into: Linen, and for some files the two others."""
    return ["linen", *(["torch", "nnx"] if name in ("mixed", "diffusers") else [])]


READS = [(name, kind) for name in golden()["adapter"] if name != "bare" for kind in kinds(name)]
IN_DEFAULT = ("mixed-linen", "diffusers-torch", "diffusers-nnx", "old_diffusers-linen", "diffusers")


def cases(*all_of: Any) -> list[Any]:
    """All cases, of which the default run takes a few."""
    names = [case if isinstance(case, str) else "-".join(case) for case in all_of]
    marks = [() if name in IN_DEFAULT else pytest.mark.nightly for name in names]
    parts = [(case,) if isinstance(case, str) else case for case in all_of]
    return [pytest.param(*p, id=name, marks=m) for p, name, m in zip(parts, names, marks, strict=True)]


@pytest.mark.drawn(2)
@pytest.mark.parametrize(("name", "kind"), cases(*READS))
def test_from_other_libraries(tmp_path, name, kind):
    """What LyCORIS and diffusers merge is what jlora merges; and saving what was read changes no weight."""
    recorded, at = golden()["adapter"][name], program(kind)
    file = write(recorded["file"], tmp_path / "given.safetensors")
    ignore = None if kind == "linen" else OF_ENCODER
    adapter = jlora.kohya.load(file, at.sites, at.names, params=at.params, ignore=ignore)
    check_merged(adapter, at, recorded)
    jlora.kohya.save(tmp_path / "saved.safetensors", adapter, at.names, params=at.params)
    again = jlora.kohya.load(tmp_path / "saved.safetensors", at.sites, at.names, params=at.params)
    check_merged(again, at, recorded)


@pytest.mark.parametrize("name", ["mixed", "more", "convolutions", "diffusers", "kohya"])
def test_info(tmp_path, name):
    """The norms are those of the recorded differences; LoKr and DoRA of a convolution included."""
    recorded = golden()["adapter"][name]
    report = jlora.info(write(recorded["file"], tmp_path / "a.safetensors"))
    assert (report.format, report.refused) == ("diffusers" if name == "diffusers" else "kohya or LyCORIS", ())
    norms = {spelled(u.path): u.norm for u in report.adapters[""].updates if not isinstance(u.method, jlora.DoRA)}
    expected = {key.removeprefix("merged "): value for key, value in recorded.items() if key != "file"}
    for key, value in expected.items():
        if (norm := norms.pop(spelled(key), None)) is not None:
            np.testing.assert_allclose(norm, np.linalg.norm(value - weights()[key]), rtol=1e-4)
    assert not norms


def spelled(name: str) -> str:
    """A key or a name, alike for both."""
    name = name.replace("lora_unet", "unet").replace("lora_te", "text_encoder").replace(".", "_")
    return name.removesuffix("_weight")


@pytest.mark.parametrize("name", golden()["refused"])
def test_info_names_what_is_refused(tmp_path, name):
    report = jlora.info(write(golden()["refused"][name]["file"], tmp_path / "a.safetensors"))
    assert bool(report.refused) == (name != "unbalanced")  # which depends on the axes of the weight


def check_merged(adapter: jlora.Adapter, at: Program, recorded: dict[str, np.ndarray]) -> None:
    """Every recorded weight is merged so, and no other weight changes."""
    merged = at.torch(jlora.merge(at.params, adapter))
    expected = {key.removeprefix("merged "): value for key, value in recorded.items() if key != "file"}
    assert expected
    for key, value in merged.items():
        assert error(value, expected.get(key, weights()[key])) <= BOUND, key


@pytest.mark.parametrize("name", cases(*EXPORTS))
def test_to_other_libraries(tmp_path, name):
    """What jlora writes is what LyCORIS or diffusers merged to the same weights."""
    recorded, at = golden()["export"][name], program("linen")
    adapter = exported(name, at.sites)
    check_merged(adapter, at, recorded)
    file = tmp_path / "a.safetensors"
    jlora.kohya.save(file, adapter, at.names, params=at.params, form=EXPORTS[name].form)
    assert file.read_bytes() == recorded["file"].tobytes()


def test_a_single_model(tmp_path):
    """LyCORIS on any model of torch: the names have no component, the keys the prefix "lycoris"."""
    recorded, at = golden()["adapter"]["bare"], program("linen")
    names = {"params/te_query": "text_model.encoder.layers.{i}.self_attn.q_proj"}
    adapter = jlora.kohya.load(write(recorded["file"], tmp_path / "a.safetensors"), at.sites, names)
    check_merged(adapter, at, recorded)
    jlora.kohya.save(tmp_path / "b.safetensors", adapter, names)
    tensors = load_file(tmp_path / "b.safetensors")
    assert all(key.startswith("lycoris_text_model_encoder_layers_") for key in tensors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tucker", "conv1: it has hada_t1, the Tucker form of LoHa"),
        ("wd_on_in", r"to_k: its magnitudes have the shape \(1, 10\).*wd_on_out=True"),
        ("wd_loha", "to_k: it has dora_scale beside .*jlora has DoRA of LoRA alone"),
        ("ia3", "IA3 of LyCORIS"),
        ("oft", "OFT of LyCORIS"),
        ("glora", "GLoRA of LyCORIS"),
        ("unbalanced", r"proj: its Kronecker product has a first factor of 12 x 2, and no LoKr of jlora"),
    ],
)
def test_methods_that_are_refused(tmp_path, name, message):
    at = program("linen")
    file = write(golden()["refused"][name]["file"], tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        jlora.kohya.load(file, at.sites, at.names, params=at.params)


if all(importlib.util.find_spec(library) for library in LIBRARIES):

    def test_live():
        """The golden file holds what its script makes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tests.golden import kohya

            recorded = kohya.records()
        flat = {
            f"{s}/{n}/{k}": a for s, names in golden().items() for n, arrays in names.items() for k, a in arrays.items()
        }
        assert set(recorded) == set(flat)
        for key, expected in flat.items():
            if key.endswith("/file"):
                assert recorded[key].tobytes() == expected.tobytes(), key
            else:
                assert error(recorded[key], expected) <= BOUND, key
