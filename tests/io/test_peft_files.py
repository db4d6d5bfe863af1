"""Files of PEFT that are written here, and their weights in NumPy: biases, layers of a stack, tokens of a head."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io.peft import Module
from tests.support.peft_files import FILES, NAMES, load_for_bert

PREFIX = "base_model.model."
BOUND = 1e-5
Tensors = dict[str, np.ndarray]
RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def write(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    """A file of LoRA of rank 2 and scale 2."""
    folder.mkdir()
    save_file({PREFIX + name: array for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def lora(module: str, n_in: int, n_out: int) -> tuple[Tensors, np.ndarray]:
    """A module's tensors, and what they add to its kernel (in, out)."""
    a, b = draw(2, n_in), draw(n_out, 2)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, 2 * (b @ a).T


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=BOUND * max(1, np.abs(expected).max()))


# Two layers with biases, of which the first is adapted.
LAYERS = {name: {"kernel": draw(*shape), "bias": draw(shape[1])} for name, shape in (("a", (4, 6)), ("b", (6, 5)))}
LAYER_NAMES = {
    **{f"{name}/kernel": f"m.{name}" for name in "ab"},
    **{f"{name}/bias": Module(f"m.{name}.bias", "parameter") for name in "ab"},
}


def layers(params: Any, x: jax.Array) -> jax.Array:
    y = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return y @ params["b"]["kernel"] + params["b"]["bias"][None]


@pytest.fixture
def layer_sites() -> jlora.Sites:
    return jlora.trace(layers, LAYERS, jnp.ones((3, 4)))


@pytest.mark.parametrize("key", ["m.a.base_layer.bias", "m.a.bias"])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases(tmp_path, layer_sites, bias, key):
    """Either spelling of a bias is read, and the adapter that is saved holds the same values."""
    tensors, delta = lora("m.a", 4, 6)
    trained = {"a": draw(6), "b": draw(5) if bias == "all" else LAYERS["b"]["bias"]}
    tensors |= {key: trained["a"]} | ({"m.b.bias": trained["b"]} if bias == "all" else {})
    given = write(tmp_path / "given", tensors, target_modules=["a"], bias=bias)
    for folder in (given, tmp_path / "saved"):
        adapter = jlora.peft.load(folder, layer_sites, LAYER_NAMES, params=LAYERS)
        merged = jlora.merge(LAYERS, adapter)
        assert_close(merged["a"]["kernel"], LAYERS["a"]["kernel"] + delta)
        for name, value in trained.items():
            assert_close(merged[name]["bias"], value)
        if folder is given:
            jlora.peft.save(tmp_path / "saved", adapter, LAYER_NAMES, params=LAYERS)


@pytest.mark.parametrize(("bias", "present"), [("lora_only", []), ("all", ["m.a.base_layer.bias"])])
def test_a_lost_bias_is_refused(tmp_path, layer_sites, bias, present):
    tensors = lora("m.a", 4, 6)[0] | {key: draw(6) for key in present}
    folder = write(tmp_path / "given", tensors, target_modules=["a"], bias=bias)
    with pytest.raises(ValueError, match=rf"bias = '{bias}', and the file lacks \['m\.[ab]\.bias'\]"):
        jlora.peft.load(folder, layer_sites, LAYER_NAMES, params=LAYERS)


@pytest.mark.parametrize(("trained", "bias", "stored"), [("a", "lora_only", 1), ("b", "all", 2)])
def test_all_biases_that_a_file_names_are_saved(tmp_path, layer_sites, trained, bias, stored):
    """PEFT names the biases of all adapted modules, or all biases: those that are not trained have their base value."""
    targets = {"a/kernel": jlora.LoRA(2), f"{trained}/bias": jlora.Full()}
    adapter = jlora.init(jax.random.key(0), layer_sites, targets)
    jlora.peft.save(tmp_path / "saved", adapter, LAYER_NAMES, params=LAYERS)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    biases = {name: array for name, array in tensors.items() if name.endswith("bias")}
    assert (config["bias"], len(biases)) == (bias, stored)
    for name, array in biases.items():
        assert np.array_equal(array, LAYERS[name.removeprefix(PREFIX)[2]]["bias"])
    again = jlora.peft.load(tmp_path / "saved", layer_sites, LAYER_NAMES, params=LAYERS)
    assert_close(jlora.merge(LAYERS, again)["b"]["bias"], LAYERS["b"]["bias"])


# A stack of four layers that a scan runs over.
STACK_NAMES = {"w": "model.layers.{i}.q_proj"}


def scanned(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, params["w"])[0]


@pytest.mark.parametrize(
    ("adapted", "fields"),
    [
        ([1, 3], {"target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"}),
        ([2], {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": ["layers"]}),
        ([0], {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
        ([0], {"target_modules": r".*layers\.0\..*q_proj"}),
    ],
)
def test_some_layers_of_a_stack(tmp_path, adapted, fields):
    """Layers that the configuration leaves out stay as they are, before and after training."""
    params, x = {"w": jnp.asarray(draw(4, 6, 6))}, jnp.asarray(draw(3, 6))
    expected, tensors = np.array(params["w"]), {}
    for layer in adapted:
        added, delta = lora(f"model.layers.{layer}.q_proj", 6, 6)
        tensors |= added
        expected[layer] += delta
    sites = jlora.trace(scanned, params, x)
    adapter = jlora.peft.load(write(tmp_path / "given", tensors, **fields), sites, STACK_NAMES)
    assert_close(jlora.merge(params, adapter)["w"], expected)
    gradients = jax.grad(lambda adapter: jnp.sin(jlora.adapt(scanned)(params, adapter, x)).sum())(adapter)
    for layer in range(4):
        for factor in ("a", "b"):
            assert bool(gradients["w"][factor][layer].any()) == (layer in adapted)
    jlora.peft.save(tmp_path / "saved", adapter, STACK_NAMES)
    again = jlora.peft.load(tmp_path / "saved", sites, STACK_NAMES)
    assert_close(jlora.merge(params, again)["w"], expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, "the file lacks them: .*layers.1.q_proj"),
        ({"target_modules": "all-linear"}, "layers.1.q_proj has no adapter|layers.1.q_proj, .* has no adapter"),
    ],
)
def test_layers_that_are_lost_are_refused(tmp_path, fields, message):
    params = {"w": jnp.asarray(draw(4, 6, 6))}
    tensors, _ = lora("model.layers.0.q_proj", 6, 6)
    folder = write(tmp_path / "given", tensors, **fields)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(folder, jlora.trace(scanned, params, jnp.ones((3, 6))), STACK_NAMES, params=params)


def test_dora_of_one_layer_of_a_stack(tmp_path):
    params = {"w": jnp.asarray(draw(4, 6, 6))}
    tensors, delta = lora("model.layers.2.q_proj", 6, 6)
    magnitude = tensors["model.layers.2.q_proj.lora_magnitude_vector"] = draw(6)
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [2], "use_dora": True}
    folder = write(tmp_path / "given", tensors, **fields)
    adapter = jlora.peft.load(folder, jlora.trace(scanned, params, jnp.ones((3, 6))), STACK_NAMES, params=params)
    expected = np.array(params["w"])
    moved = expected[2] + delta
    expected[2] = magnitude * moved / np.linalg.norm(moved, axis=0)
    assert_close(jlora.merge(params, adapter)["w"], expected)


@pytest.mark.parametrize("n_in", [6, 4])
def test_trained_tokens_of_an_output_head(tmp_path, n_in):
    """PEFT replaces rows of torch's weight (out, in), which are columns of a kernel (in, out)."""
    params, tokens, rows = {"head": draw(n_in, 6)}, [1, 4], draw(2, n_in)
    tensors = {"lm_head.token_adapter.trainable_tokens_delta": rows}
    folder = write(tmp_path / "given", tensors, target_modules=[], trainable_token_indices={"lm_head": tokens})
    sites = jlora.trace(lambda p, x: x @ p["head"], params, jnp.ones((3, n_in)))
    adapter = jlora.peft.load(folder, sites, {"head": "lm_head"}, params=params)
    expected = params["head"].copy()
    expected[:, tokens] = rows.T
    assert_close(jlora.merge(params, adapter)["head"], expected)
    wrong = write(
        tmp_path / "wrong", {n: draw(2, 5) for n in tensors}, target_modules=[], trainable_token_indices=[1, 4]
    )
    with pytest.raises(ValueError, match=r"lm_head has trained rows of shape \(2, 5\)"):
        jlora.peft.load(wrong, sites, {"head": "lm_head"}, params=params)


def test_the_base_model_and_the_task_are_in_the_configuration(given_files, tmp_path):
    adapter = load_for_bert(given_files)
    jlora.peft.save(tmp_path / "a", adapter, NAMES, base_model="org/model", task_type="FEATURE_EXTRACTION")
    config = json.loads((tmp_path / "a" / FILES[0]).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/model", "FEATURE_EXTRACTION")
    assert jax.tree.all(jax.tree.map(np.array_equal, load_for_bert(tmp_path / "a"), adapter))
    jlora.peft.save(tmp_path / "b", adapter, NAMES)
    config = json.loads((tmp_path / "b" / FILES[0]).read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (None, None)
    with pytest.raises(ValueError, match=r"no task_type 'causal_lm'; it has SEQ_CLS, .*CAUSAL_LM"):
        jlora.peft.save(tmp_path / "c", adapter, NAMES, task_type="causal_lm")
    assert not (tmp_path / "c").exists()


def test_fused_modules_of_several_widths(tmp_path):
    """Query, key and value of 6, 2 and 2 in one kernel: each gets its rows of B, and they come back."""
    names = {"qkv": [Module(f"{name}_proj", size=size) for name, size in (("q", 6), ("k", 2), ("v", 2))]}
    params, x = {"qkv": draw(4, 10)}, draw(3, 4)
    sites = jlora.trace(lambda p, x: x @ p["qkv"], params, x)
    parts = [lora(f"{name}_proj", 4, size) for name, size in (("q", 6), ("k", 2), ("v", 2))]
    folder = write(
        tmp_path / "a",
        {k: v for tensors, _ in parts for k, v in tensors.items()},
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    adapter = jlora.peft.load(folder, sites, names)
    expected = params["qkv"] + np.concatenate([delta for _, delta in parts], 1)
    np.testing.assert_allclose(jlora.merge(params, adapter)["qkv"], expected, atol=BOUND)
    jlora.peft.save(tmp_path / "b", adapter, names)
    config = json.loads((tmp_path / "b" / FILES[0]).read_text())
    tensors = load_file(tmp_path / "b" / FILES[1])
    for (_, delta), name in zip(parts, "qkv", strict=True):
        a, b = (tensors[f"{PREFIX}{name}_proj.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_allclose((b @ a).T * config["lora_alpha"] / config["r"], delta, atol=BOUND)
    for entry in (["q_proj", "k_proj", "v_proj"], [Module("q_proj", size=6), Module("k_proj", size=6)]):
        with pytest.raises(ValueError, match=r"qkv has 10 outputs, and its modules .*give each its size"):
            jlora.peft.save(tmp_path / "c", adapter, {"qkv": entry})


def test_ia3_of_a_module_without_a_bias(tmp_path):
    """The program has a bias that torch's module does not have: the map says so, and IA3 leaves the bias as it is."""
    x, w, b = jnp.ones((2, 3)), jnp.arange(12.0).reshape(3, 4), jnp.arange(4.0)
    scale = np.array([[1.0], [2.0], [0.5], [-1.0]], np.float32)
    config = {"peft_type": "IA3", "target_modules": ["layer"], "feedforward_modules": []}
    (tmp_path / FILES[0]).write_text(json.dumps(config))
    save_file({"base_model.model.layer.ia3_l": scale}, tmp_path / FILES[1])

    def layer(params, x):
        return x @ params["layer"]["w"] + params["layer"]["b"][None]

    params = {"layer": {"w": w, "b": b}}
    sites = jlora.trace(layer, params, x)
    with pytest.raises(ValueError, match=r"layer/b may be that of layer/w.*names\['layer/b'\] = None"):
        jlora.peft.load(tmp_path, sites, {"layer/w": "layer"}, params=params)
    names: jlora.peft.Names = {"layer/b": None, "layer/w": "layer"}
    adapter = jlora.peft.load(tmp_path, sites, names, params=params)
    np.testing.assert_allclose(jlora.adapt(layer)(params, adapter, x), (x @ w) * scale.T + b[None], rtol=1e-6)
    jlora.peft.save(tmp_path / "again", adapter, names, params=params)
    written = load_file(tmp_path / "again" / FILES[1])
    np.testing.assert_array_equal(written["base_model.model.layer.ia3_l"], scale)


def test_modules_whose_name_ends_another_are_written_as_one_expression(tmp_path):
    """PEFT matches a list by endings, so that "out" would adapt "x.out" too, with numbers that the file lacks."""
    params = {"y": jnp.ones((6, 4)), "z": jnp.ones((6, 4))}
    sites = jlora.trace(lambda p, x: x @ p["y"] + x @ p["z"], params, jnp.ones((2, 6)))
    names = {"y": "out", "z": "x.out"}
    for paths, targets in (("y", "out"), ("z", ["x.out"]), (".", ["out", "x.out"])):
        adapter = jlora.init(jax.random.key(0), sites, {paths: jlora.DoRA(2)}, params=params)
        folder = tmp_path / paths.replace(".", "both")
        jlora.peft.save(folder, adapter, names, params=params)
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == targets
        assert jlora.peft.load(folder, sites, names, params=params).keys() == adapter.keys()
