"""PEFT's HiRA, DeLoRA, MiSS, GLoRA and RandLoRA: what their files do not determine, and forms that PEFT has not."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from tests.io.test_peft_types import GOLDEN, PARAMS, SITES, X, unpack
from tests.support import peft_types
from tests.support.peft_files import change_configuration, change_tensors

NAMES = peft_types.NAMES


def outputs(adapter: jlora.Adapter) -> jax.Array:
    return jlora.adapt(peft_types.apply)(PARAMS, adapter, X)


@pytest.mark.parametrize("params", [None, jax.tree.map(lambda w: 2 * w, PARAMS)], ids=["no", "another"])
def test_delora_without_the_base_of_its_norms_is_the_equal_lora(params, tmp_path):
    want = unpack("adapter", "delora", tmp_path / "a")
    adapter = jlora.peft.load(tmp_path / "a", SITES, NAMES, params=params)
    assert {type(update.method) for update in adapter.values()} == {jlora.LoRA}
    np.testing.assert_allclose(outputs(adapter), want, atol=2e-5)


def test_delora_of_one_module_in_several_weights_is_the_equal_lora(tmp_path):
    """The norms of B run over all outputs of the module, and a weight has some of them."""
    want = unpack("adapter", "delora", tmp_path / "a")
    kernel = PARAMS["out"]["kernel"]
    params = {**PARAMS, "out": {**PARAMS["out"], "kernel": {"x": kernel[:, :4], "y": kernel[:, 4:]}}}

    def program(params, x):
        kernel = jnp.concatenate(list(params["out"]["kernel"].values()), -1)
        return peft_types.apply({**params, "out": {**params["out"], "kernel": kernel}}, x)

    names = {name: module for name, module in NAMES.items() if name != "out/kernel"}
    names |= {f"out/kernel/{name}": jlora.peft.Module("out", part=k) for k, name in enumerate("xy")}
    sites = jlora.trace(program, params, X)
    adapter = jlora.peft.load(tmp_path / "a", sites, names, params=params)
    assert type(adapter["out/kernel/x"].method) is jlora.LoRA
    np.testing.assert_allclose(jlora.adapt(program)(params, adapter, X), want, atol=2e-5)


@pytest.mark.parametrize(
    ("gain", "shift", "form", "rank"),
    [
        ("vector", "lora", "lora", 2),
        ("lora", "none", "lora", 2),
        ("none", "constant", "constant", 2),
        ("constant", "vector", "vector", 2),
    ],
)
def test_glora_has_one_form_for_both_in_peft(gain, shift, form, rank, tmp_path):
    adapter = jlora.init(jax.random.key(0), SITES, {".*kernel": jlora.GLoRA(2, gain, shift)})
    adapter = jax.tree.map(lambda a: a + 0.25 * jnp.cos(jnp.arange(a.size).reshape(a.shape)), adapter)
    adapter = jlora.scale(adapter, 0.5)
    notes = jlora.peft.save(tmp_path / "a", adapter, NAMES)
    assert len(notes) == 3
    assert all(f"became '{form}'" in note for note in notes)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["config_A_B"], config["r"]) == ("GLORA", form, rank)
    loaded = jlora.peft.load(tmp_path / "a", SITES, NAMES)
    assert {update.method for update in loaded.values()} == {jlora.GLoRA(2, form, form)}
    np.testing.assert_allclose(outputs(loaded), outputs(adapter), atol=1e-5)


def test_ranks_of_hira_and_glora_are_padded(tmp_path):
    """PEFT 0.21.2 creates all of these with the rank that no pattern names."""
    for method in (lambda rank: jlora.HiRA(rank, 3.0), lambda rank: jlora.GLoRA(rank, "lora", "lora")):
        targets = {"layers/kernel": method(2), "out/kernel": method(3)}
        adapter = jlora.init(jax.random.key(0), SITES, targets)
        adapter = jax.tree.map(lambda a: a + 0.1, adapter)
        name = type(method(1)).__name__
        notes = jlora.peft.save(tmp_path / name, adapter, NAMES)
        assert len(notes) == (2 if name == "HiRA" else 0)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(("hira_A", "Xu"))} == {3}
        np.testing.assert_allclose(outputs(jlora.peft.load(tmp_path / name, SITES, NAMES)), outputs(adapter), atol=1e-5)


def test_miss_of_several_ranks_is_written_as_lora(tmp_path):
    adapter = jlora.init(jax.random.key(0), SITES, {"layers/kernel": jlora.MiSS(4), "out/kernel": jlora.MiSS(2)})
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    assert len(jlora.peft.save(tmp_path / "a", adapter, NAMES)) == 2
    np.testing.assert_allclose(outputs(jlora.peft.load(tmp_path / "a", SITES, NAMES)), outputs(adapter), atol=1e-5)


def test_block_diagonal_and_plain_loras_are_written_as_plain_ones(tmp_path):
    params = {"x": jnp.ones((12, 16)), "y": jnp.ones((16, 12))}
    sites = jlora.trace(lambda p, x: x @ p["x"] @ p["y"], params, jnp.ones((2, 12)))
    adapter = jlora.init(jax.random.key(0), sites, {"x": jlora.BDLoRA(4, 2), "y": jlora.LoRA(2)})
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    names = {"x": "x", "y": "y"}
    notes = jlora.peft.save(tmp_path / "a", adapter, names)
    assert notes == ("x: BDLoRA became a LoRA of rank 4, by its factors.",)
    loaded = jlora.merge(params, jlora.peft.load(tmp_path / "a", sites, names))
    for path, weight in jlora.merge(params, adapter).items():
        np.testing.assert_allclose(loaded[path], weight, atol=1e-5)


def without(*endings):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(endings)}


@pytest.mark.parametrize(
    ("name", "fields", "change", "names", "message"),
    [
        ("miss", {"init_weights": "bat"}, dict, NAMES, "'bat' multiplies blocks"),
        ("randlora", {}, without("l.randlora_A", "l.randlora_B"), NAMES, "save_projection=True"),
        (
            "randlora",
            {},
            lambda t: t | {"base_model.model.out.randlora_A": t["base_model.randlora_A"] + 1},
            NAMES,
            "out.randlora_A is another matrix",
        ),
        (
            "glora",
            {},
            dict,
            {n: m for n, m in NAMES.items() if n != "out/bias"},
            "C, D and E.*names have none beside out/kernel",
        ),
        ("glora_constant", {}, lambda t: {n: a + n.endswith("zeros") for n, a in t.items()}, NAMES, "is not zero"),
        ("glora", {}, without("out.glora_B.Xd"), NAMES, r"missing \['glora_B.Xd'\]"),
    ],
)
def test_what_is_refused(name, fields, change, names, message, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    change_configuration(tmp_path / "a", **fields)
    change_tensors(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(tmp_path / "a", SITES, names, params=PARAMS)


def test_glora_changes_biases_of_the_base_alone_if_it_has_params(tmp_path):
    unpack("adapter", "glora", tmp_path / "a")
    with pytest.raises(ValueError, match="Pass params="):
        jlora.peft.load(tmp_path / "a", SITES, NAMES)


def test_randlora_of_another_form_is_refused(tmp_path):
    adapter = jlora.init(jax.random.key(0), SITES, jlora.RandLoRA(3))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    with pytest.raises(ValueError, match=r"RandLoRA .* matrices=\(larger, smaller\)"):
        jlora.peft.save(tmp_path / "a", adapter, NAMES)


@pytest.mark.parametrize("matrices", [(12, 4), pytest.param((17, 13), marks=pytest.mark.nightly)])
def test_matrices_of_randlora_are_written_in_the_sizes_that_peft_derives(matrices, tmp_path):
    """Those of the largest in size and the largest out size, both 10 here: larger ones are cut, others filled up."""
    params = {"x": jnp.ones((4, 10)), "y": jnp.ones((10, 4))}
    sites = jlora.trace(lambda p, x: x @ p["x"] @ p["y"], params, jnp.ones((2, 4)))
    adapter = jlora.init(jax.random.key(0), sites, jlora.RandLoRA(3, matrices=matrices))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    names = {"x": "x", "y": "y"}
    jlora.peft.save(tmp_path / "a", adapter, names)
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert written["base_model.randlora_A"].shape == (3, 1, 10)
    assert written["base_model.randlora_B"].shape == (10, 4, 3)
    loaded = jlora.merge(params, jlora.peft.load(tmp_path / "a", sites, names))
    for path, weight in jlora.merge(params, adapter).items():
        np.testing.assert_allclose(loaded[path], weight, atol=1e-5)


@pytest.mark.parametrize("matrices", [(8, 12), (12, 2), (12,), (12.0, 8), "12"])
def test_sizes_of_shared_matrices_are_checked(matrices):
    with pytest.raises(ValueError, match=r"two sizes \(larger, smaller\)"):
        jlora.RandLoRA(3, matrices=matrices)


def test_shared_matrices_are_large_enough():
    with pytest.raises(ValueError, match=r"its sides are 12 and 8, and matrices=\(8, 8\) must be at least as large"):
        jlora.init(jax.random.key(0), SITES, {"out/kernel": jlora.RandLoRA(3, matrices=(8, 8))})


def test_all_new_types_were_recorded():
    assert {"hira", "delora", "miss", "glora", "randlora"} <= set(GOLDEN["adapter"]) & set(GOLDEN["export"])


def series(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1,), "SAME", dimension_numbers=("NCH", "HIO", "NCH"))


@pytest.mark.parametrize("window", [1, 3])
def test_lokr_of_a_series_is_refused_if_peft_permutes_it(window, tmp_path):
    """As kron((a, c), (b, d, window)), whose result PEFT reshapes; with a second factor of low rank it does not."""
    params = {"w": jnp.zeros((window, 8, 12))}
    sites = jlora.trace(series, params, jnp.zeros((1, 8, 5)))
    names = {"w": jlora.peft.Module("conv", "conv")}
    for rank, notes in ((1, 0), (4, 1)):
        adapter = jlora.init(jax.random.key(0), sites, jlora.LoKr(rank, 3.0))
        adapter = jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size).reshape(a.shape)), adapter)
        folder = tmp_path / str(rank)
        assert len(jlora.peft.save(folder, adapter, names)) == notes
        loaded = jlora.peft.load(folder, sites, names)
        np.testing.assert_allclose(jlora.merge(params, loaded)["w"], jlora.merge(params, adapter)["w"], atol=1e-5)


def test_a_permuted_lokr_is_not_read(tmp_path):
    params = {"w": jnp.zeros((3, 8, 12))}
    sites = jlora.trace(series, params, jnp.zeros((1, 8, 5)))
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoKr(1, 3.0))
    names = {"w": jlora.peft.Module("conv", "conv")}
    jlora.peft.save(tmp_path / "a", adapter, names)
    change_tensors(
        tmp_path / "a",
        lambda t: {
            "base_model.model.conv.lokr_w1": t["base_model.model.conv.lokr_w1"],
            "base_model.model.conv.lokr_w2": np.zeros((4, 4, 3), np.float32),
        },
    )
    with pytest.raises(ValueError, match=r"conv: PEFT 0\.21\.2 permutes the Kronecker product"):
        jlora.peft.load(tmp_path / "a", sites, names)


def test_hira_of_an_embedding_and_its_tied_head_is_not_written(tmp_path):
    """PEFT has a module for each of the two uses of the weight."""
    params = {"embed": jnp.asarray(np.random.RandomState(0).normal(size=(7, 5)), jnp.float32)}
    sites = jlora.trace(lambda p, ids: p["embed"][ids] @ p["embed"].T, params, np.zeros(3, np.int32))
    adapter = jlora.init(jax.random.key(0), sites, jlora.HiRA(2))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    embedding = {"embed": jlora.peft.Module("embed_tokens", "embedding", tied="lm_head")}
    with pytest.raises(ValueError, match=r"embed: the update of HiRA .* Merge it"):
        jlora.peft.save(tmp_path / "a", adapter, embedding, params=params)
