"""Adapters of PEFT in jlora and of jlora in PEFT: the outputs that `golden/exchange.py` recorded."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.support import peft_exports
from tests.support.peft_files import BOUND, FILES, NIGHTLY, content, error, golden, program, settled, unpack
from tests.support.peft_models import MODELS

LIBRARIES = ("torch", "transformers", "peft")
FORMS = ("llama decoder", "llama decoder_dora", "llama head")  # those that are read into every form of Llama


@pytest.mark.parametrize("model", MODELS)
def test_the_models_are_those_of_torch(model):
    params, _, run = program(model)
    assert error(run(params), golden()["input"][MODELS[model].torch]["y"]) <= BOUND


def imports() -> list[Any]:
    """Every adapter of PEFT for its model, and some for the scanned and fused forms of Llama."""
    return [
        pytest.param(name, model, marks=[pytest.mark.nightly] * (name.split()[1] in NIGHTLY))
        for name in golden()["adapter"]
        for model in MODELS
        if MODELS[model].torch == name.split()[0] and (model in (name.split()[0], "mixtral_scanned") or name in FORMS)
    ]


@pytest.mark.parametrize(("name", "model"), imports())
def test_from_peft(name, model, tmp_path):
    """What PEFT wrote computes the same here; and saving what was read, and reading that, changes no byte."""
    files = golden()["adapter"][name]
    params, sites, run = program(model)
    folder, start = unpack(files, tmp_path / "given"), None
    if "start" in files:
        start = unpack({**files, FILES[1]: files["start"]}, tmp_path / "start")
    adapter = jlora.peft.load(folder, sites, MODELS[model].names, params=params, start=start)
    assert error(run(jlora.merge(params, adapter)), files["y"]) <= BOUND
    jlora.peft.save(tmp_path / "one", adapter, MODELS[model].names, params=params)
    again = jlora.peft.load(tmp_path / "one", sites, MODELS[model].names, params=params)
    jlora.peft.save(tmp_path / "two", again, MODELS[model].names, params=params)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    if name.split()[1] not in REWRITTEN and model != "llama_fused":
        assert jax.tree.structure(adapter) == jax.tree.structure(again)
        assert content(tmp_path / "one")[FILES[1]] == files[FILES[1]].tobytes()


# Adapters that are not written as they were read. A base embedding is left out, experts get one rank, and what PEFT has
# in another form becomes the plain one: VeRA with torch's matrices and AdaLoRA become LoRA, a start that changes the
# base doubles the rank, and `lora_bias` becomes a trained bias.
REWRITTEN = (
    *("vera", "drawn", "with_base", "tied", "tied_saved", "tokens_alone_tied", "compressed", "experts"),
    *("weights", "conv1d_weights", "weights_pissa"),
    *("output_bias", "output_bias_beside", "conv1d_output_bias", "convolution_output_bias"),
    *("pissa", "pissa_dora", "conv1d_pissa", "pissa_iterated", "olora", "corda", "lora_ga"),
    *("adalora", "adalora_pruned", "convolution_adalora", "effective_loha", "effective_lokr"),
)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", peft_exports.EXPORTS)
def test_to_peft(name, tmp_path):
    """What jlora writes is what PEFT loaded without a warning, and computes what PEFT computed with it.

    Reading it and writing that changes no byte.
    """
    expected, model = golden()["export"][name], peft_exports.EXPORTS[name].model
    params, sites, run = program(model)
    adapter = peft_exports.adapter(name, sites)
    assert error(run(jlora.merge(params, adapter)), expected["y"]) <= BOUND
    peft_exports.save(name, tmp_path / "a", params, sites)
    actual = content(tmp_path / "a")
    assert actual == {file: expected[file].tobytes() for file in FILES}
    again = jlora.peft.load(tmp_path / "a", sites, MODELS[model].names, params=params)
    jlora.peft.save(tmp_path / "b", again, MODELS[model].names, params=params)
    assert content(tmp_path / "b") == actual


@pytest.mark.parametrize(
    ("name", "model"),
    [("bert dora", "bert"), ("llama decoder", "llama_fused"), ("mixtral experts", "mixtral_scanned")],
)
def test_without_merging(name, model, tmp_path):
    """An adapter of PEFT computes the same if it is not merged."""
    params, sites, _ = program(model)
    given = golden()["adapter"][name]
    adapter = jlora.peft.load(unpack(given, tmp_path / "a"), sites, MODELS[model].names, params=params)
    x = jnp.asarray(golden()["input"][MODELS[model].torch]["x"])
    y = jax.jit(jlora.adapt(MODELS[model].apply, on_dense="error"))(params, adapter, x)
    assert error(y, given["y"]) <= BOUND


if all(importlib.util.find_spec(library) for library in LIBRARIES):

    def test_live():
        """The golden file holds what its script makes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tests.golden import exchange
        recorded = exchange.records()
        flat = {
            f"{s}/{n}/{k}": a for s, names in golden().items() for n, arrays in names.items() for k, a in arrays.items()
        }
        assert set(recorded) == set(flat)
        for key, expected in flat.items():
            if key.endswith(FILES[0]):
                assert settled(recorded[key]) == settled(expected), key
            elif key.endswith((FILES[1], "start")):
                assert recorded[key].tobytes() == expected.tobytes(), key
            else:
                assert error(recorded[key], expected) <= BOUND, key
