"""Rotations and projections in PEFT's files: what PEFT wrote is read, computes the same, and is written again.

`golden/maps.py` has recorded the files and the outputs.
"""

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
from tests.golden.maps import OPTIONS

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "maps.npz")
NAMES = {"w": "0", "b": "0.bias"}
PARAMS = {"w": jnp.asarray(GOLDEN["weight"].T), "b": jnp.asarray(GOLDEN["bias"])}
X = jnp.asarray(GOLDEN["x"])
TEMPLATE = "base_model.model.0."


@jax.jit
def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"][None]


SITES = jlora.trace(model, PARAMS, X)


def config_of(name: str) -> dict[str, Any]:
    return json.loads(str(GOLDEN[f"{name}/config"]))


def tensors_of(name: str) -> dict[str, np.ndarray]:
    stem = f"{name}/tensor/"
    return {key.removeprefix(stem): GOLDEN[key] for key in GOLDEN.files if key.startswith(stem)}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def load(folder: Path) -> dict[str, jlora.Update]:
    return jlora.peft.load(folder, SITES, names=NAMES, params=PARAMS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_file_of_peft_computes_the_same_and_is_written_again(name, tmp_path):
    adapter = load(write(tmp_path / "peft", config_of(name), tensors_of(name)))
    y = jlora.adapt(model)(PARAMS, adapter, X)
    np.testing.assert_allclose(y, GOLDEN[f"{name}/y"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model(jlora.merge(PARAMS, adapter), X), GOLDEN[f"{name}/y"], rtol=1e-5, atol=1e-5)

    jlora.peft.save(tmp_path / "jlora", adapter, names=NAMES, params=PARAMS)
    again = load(tmp_path / "jlora")
    np.testing.assert_allclose(jlora.adapt(model)(PARAMS, again, X), y, rtol=1e-5, atol=1e-5)
    config, written = json.loads((tmp_path / "jlora" / "adapter_config.json").read_text()), config_of(name)
    fields = OPTIONS[name][1].keys() - {"r", "oft_block_size", "num_cayley_neumann_terms", "apply_GS"}
    assert {field: config[field] for field in fields} == {field: written[field] for field in fields}
    tensors = load_file(tmp_path / "jlora" / "adapter_model.safetensors")
    assert {key: a.shape for key, a in tensors.items()} == {key: a.shape for key, a in tensors_of(name).items()}
    if name not in ("boft", "hra_gram_schmidt", "deft_qr", "para_qr"):  # other arrays of the same value
        for key, tensor in tensors.items():
            np.testing.assert_allclose(tensor, tensors_of(name)[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [jlora.OFT(4), jlora.BOFT(4, 2), jlora.RoAd(2, 6), jlora.DEFT(2, 6.0, "qr")])
def test_a_scale_is_written_with_the_factors(method, tmp_path):
    start = jlora.init(jax.random.key(0), SITES, {"w": method}, params=PARAMS)
    rng = np.random.default_rng(0)
    moved = {n: a + np.float32(0.3) * rng.normal(size=a.shape).astype("f") for n, a in start["w"].factors.items()}
    adapter = {"w": dataclasses.replace(start["w"], factors=moved)}
    if isinstance(method, jlora.RoAd):  # PEFT rotates the bias with the weight, and jlora the weight alone
        with pytest.raises(ValueError, match="b would change"):
            jlora.peft.save(tmp_path / "refused", adapter, names=NAMES, params=PARAMS)
    params = PARAMS | {"b": jnp.zeros_like(PARAMS["b"])}
    adapter = jlora.scale(adapter, 0.5)
    jlora.peft.save(tmp_path / "adapter", adapter, names=NAMES, params=params)
    again = jlora.peft.load(tmp_path / "adapter", SITES, names=NAMES, params=params)
    want = jlora.adapt(model)(params, adapter, X)
    np.testing.assert_allclose(jlora.adapt(model)(params, again, X), want, rtol=1e-5, atol=1e-5)


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "two terms": ("oft_neumann", {"num_cayley_neumann_terms": 2}, "gives no rotation"),
    "no switch": ("oft", {"use_cayley_neumann": None}, "lacks use_cayley_neumann"),
    "old series": ("oft_neumann", {"peft_version": "0.17.1"}, "before 0.18 computes another rotation"),
    "variant": ("road_1", {"variant": "road_3"}, "must be one of road_1, road_2, road_4"),
    "group": ("road_1", {"group_size": 5}, "4 or 6 would do"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_refused(case, tmp_path):
    name, changes, message = CHANGES[case]
    config = {key: value for key, value in (config_of(name) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "peft", config, tensors_of(name)))


def test_blocks_of_several_sizes_are_written_by_their_number(tmp_path):
    params = {"x": jnp.ones((6, 4)), "y": jnp.ones((12, 4))}
    sites = jlora.trace(lambda p, x: jnp.concatenate([x[:, :6] @ p["x"], x @ p["y"]]), params, jnp.ones((2, 12)))
    names = {"x": "x", "y": "y"}
    for size, written in ((4, {"r": 3, "oft_block_size": 0}), (2, {"r": 0, "oft_block_size": 2})):
        adapter = jlora.init(jax.random.key(0), sites, {"x": jlora.OFT(2), "y": jlora.OFT(size)})
        jlora.peft.save(tmp_path / str(size), adapter, names)
        config = json.loads((tmp_path / str(size) / "adapter_config.json").read_text())
        assert written.items() <= config.items()
        assert jlora.peft.load(tmp_path / str(size), sites, names)["y"].method == jlora.OFT(size)


@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_the_limit_of_oft_is_scaled_with_its_angles(scale, tmp_path):
    adapter = jlora.init(jax.random.key(0), SITES, {"w": jlora.OFT(4, eps=0.5)})
    adapter = jlora.scale(jax.tree.map(lambda q: q + 0.3, adapter), scale)
    jlora.peft.save(tmp_path / "a", adapter, NAMES)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["eps"] == abs(scale) * 0.5
    want = jlora.merge(PARAMS, adapter)["w"]
    np.testing.assert_allclose(jlora.merge(PARAMS, load(tmp_path / "a"))["w"], want, atol=1e-5)
    assert np.abs(want - PARAMS["w"]).max() > 0.05


def test_levels_that_peft_joins_otherwise_are_refused(tmp_path):
    tensors = tensors_of("boft")
    key = f"{TEMPLATE}boft_R"
    tensors[key] = np.concatenate([tensors[key]] * 3)
    with pytest.raises(ValueError, match="3 levels"):
        load(write(tmp_path / "peft", config_of("boft"), tensors))
