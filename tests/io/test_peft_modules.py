"""Which modules PEFT adapts and trains in full, and modules that it holds in another way than jlora."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.peft import Module

PREFIX = "base_model.model."
PARAMS = {"x": jnp.arange(24.0).reshape(6, 4) / 24, "y": jnp.arange(12.0).reshape(4, 3) / 12, "b": jnp.ones(3)}
SITES = jlora.trace(lambda p, x: x @ p["x"] @ p["y"] + p["b"][None], PARAMS, jnp.ones((2, 6)))


def write(folder: Path, modules: dict[str, tuple[int, int]], **fields: Any) -> Path:
    """A LoRA of rank 2 for modules of sizes (in, out)."""
    rng, tensors = np.random.default_rng(0), {}
    for name, (n_in, n_out) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.normal(size=(2, n_in)).astype(np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.normal(size=(n_out, 2)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# Of PEFT 0.21.2: the fields, a name that they adapt, and one that they do not.
MATCHES: list[tuple[dict[str, Any], str, str]] = [
    # without a pattern, a number counts only after two parts of the name: the one of "h.0.x.1.up" is 1
    ({"target_modules": ["up"], "layers_to_transform": [1]}, "h.0.x.1.up", "h.1.x.0.up"),
    ({"target_modules": ["up"], "layers_to_transform": 1}, "m.h.1.up", "h.1.up"),
    ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "h"}, "h.1.up", "x.1.up"),
    # the first pattern that occurs, and its first number
    ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": ["h", "x"]}, "x.0.h.1.h.0.up", "x.0.up"),
    ({"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "(h|x)"}, "x.0.up", "x.1.up"),
    ({"target_modules": ["h.5.up", "down"], "layers_to_transform": [1]}, "h.5.up", "m.h.5.down"),
    ({"target_modules": r".*\.up", "layers_to_transform": [1]}, "m.h.0.up", "up"),
    ({"target_modules": ["up"], "exclude_modules": ["0.up"]}, "h.10.up", "h.0.up"),
]


@pytest.mark.parametrize(("fields", "one", "other"), MATCHES)
def test_modules_are_matched_as_in_peft(fields, one, other, tmp_path):
    names = {"x": one, "y": other}
    folder = write(tmp_path / "a", {one: (6, 4)}, **fields)
    assert jlora.peft.load(folder, SITES, names).keys() == {"x"}
    folder = write(tmp_path / "b", {other: (4, 3)}, **fields)
    with pytest.raises(ValueError, match=rf"names these, and the file lacks them: .*{one}"):
        jlora.peft.load(folder, SITES, names)


def test_endings_of_modules_that_are_saved(tmp_path):
    """PEFT trains in full what ends with a name, also within a part of it."""
    folder = write(tmp_path / "a", {"up": (6, 4)}, target_modules=["up"], modules_to_save=["head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    head = {f"{PREFIX}my_head.weight": np.ones((3, 4), np.float32)}
    save_file(tensors | head, folder / "adapter_model.safetensors")
    adapter = jlora.peft.load(folder, SITES, {"x": "up", "y": "my_head"}, params=PARAMS)
    np.testing.assert_allclose(jlora.merge(PARAMS, adapter)["y"], 1, atol=1e-6)
    adapter = jlora.init(jax.random.key(0), SITES, {"x": jlora.LoRA(2), "y": jlora.Full()})
    for names, other in (({"x": "up.head", "y": "head"}, "up.head"), ({"x": "head.up", "y": "head"}, "head.up")):
        with pytest.raises(ValueError, match=rf"trains \['head'\] in full .* also take \['{other}'\]"):
            jlora.peft.save(tmp_path / "b", adapter, names, params=PARAMS)


def test_a_module_that_is_trained_in_full_is_written_with_its_bias(tmp_path):
    """PEFT needs all parameters of the module, also those that did not change."""
    adapter = jlora.init(jax.random.key(0), SITES, {"x": jlora.LoRA(2), "y": jlora.Full()})
    names = {"x": "up", "y": "head", "b": Module("head.bias", "parameter")}
    jlora.peft.save(tmp_path / "a", adapter, names, params=PARAMS)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors[f"{PREFIX}head.bias"], PARAMS["b"])
    np.testing.assert_array_equal(tensors[f"{PREFIX}head.weight"], PARAMS["y"].T)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    loaded = jlora.peft.load(tmp_path / "a", SITES, names, params=PARAMS)
    assert not loaded["b"].factors["d"].any()


ATTENTION = {"x": "attn", "y": "attn.out_proj"}


@pytest.mark.parametrize("paths", ["x", "y", "x|y"])
def test_attention_of_torch_is_not_written(paths, tmp_path):
    """PEFT adapts both projections by a layer of its own, and does not apply an adapter of `out_proj` alone."""
    adapter = jlora.init(jax.random.key(0), SITES, {paths: jlora.LoRA(2)})
    with pytest.raises(ValueError, match=r"x, .*: attn is torch's MultiheadAttention.*merge this adapter"):
        jlora.peft.save(tmp_path / "a", adapter, ATTENTION, params=PARAMS)


def test_attention_of_torch_is_not_read(tmp_path):
    modules = {"attn": (6, 4), "attn.base_layer.out_proj": (4, 3)}
    both = write(tmp_path / "both", modules, target_modules=["attn"])
    alone = write(tmp_path / "alone", {"attn.out_proj": (4, 3)}, target_modules=["out_proj"])
    for folder in (both, alone):
        with pytest.raises(ValueError, match=r"attn is torch's MultiheadAttention"):
            jlora.peft.load(folder, SITES, ATTENTION, params=PARAMS)
    file = alone / "adapter_model.safetensors"
    save_file({name: t * (not name.endswith("B.weight")) for name, t in load_file(file).items()}, file)
    assert jlora.peft.load(alone, SITES, ATTENTION).keys() == {"y"}  # as PEFT trains it: not at all


def test_biases_of_some_layers_of_a_stack(tmp_path):
    """A bias that is stacked for a scan is trained as a whole: other layers keep the values of the base."""
    params = {"w": jnp.ones((3, 4, 4)), "b": jnp.arange(12.0).reshape(3, 4)}

    def program(params, x):
        return jax.lax.scan(lambda x, layer: (x @ layer["w"] + layer["b"][None], None), x, params)[0]

    sites = jlora.trace(program, params, jnp.ones((2, 4)))
    names = {"w": "h.{i}.up", "b": Module("h.{i}.up.bias", "parameter")}
    modules = {f"h.{i}.up": (4, 4) for i in (0, 2)}
    folder = write(tmp_path / "a", modules, target_modules=list(modules), bias="lora_only")
    file, want = folder / "adapter_model.safetensors", np.array(params["b"])
    want[0], want[2] = 7.5, -1
    biases = {f"{PREFIX}h.{i}.up.base_layer.bias": want[i] for i in (0, 2)}
    save_file(load_file(file) | biases, file)
    adapter = jlora.peft.load(folder, sites, names, params=params)
    np.testing.assert_array_equal(jlora.merge(params, adapter)["b"], want)
    with pytest.raises(ValueError, match="Pass params="):
        jlora.peft.load(folder, sites, names)
    jlora.peft.save(tmp_path / "again", adapter, names, params=params)
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    np.testing.assert_array_equal(written[f"{PREFIX}h.2.up.base_layer.bias"], want[2])


def test_magnitudes_of_dora_are_not_written_in_16_bits(tmp_path):
    """They are sums of the norms of the base and of differences, and keep the precision of these."""
    adapter = jlora.init(jax.random.key(0), SITES, {"x": jlora.DoRA(2)}, params=PARAMS)
    factors = {name: a if name == "m" else a.astype(jnp.float16) for name, a in adapter["x"].factors.items()}
    factors["m"] = factors["m"] + 0.0123
    adapter = {"x": dataclasses.replace(adapter["x"], factors=factors)}
    jlora.peft.save(tmp_path / "a", adapter, {"x": "up"}, params=PARAMS)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}up.lora_A.weight"].dtype == np.float16
    magnitude = tensors[f"{PREFIX}up.lora_magnitude_vector"]
    np.testing.assert_allclose(magnitude, np.linalg.norm(PARAMS["x"], axis=0) + 0.0123, rtol=1e-6)
    loaded = jlora.peft.load(tmp_path / "a", SITES, {"x": "up"}, params=PARAMS)
    np.testing.assert_allclose(loaded["x"].factors["m"], factors["m"], atol=1e-6)
