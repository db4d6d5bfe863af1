"""LoRA of experts that share A or B: which axes each matrix has, what it adds, and its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.peft import Module
from tests.support.agreement import check_law

LAYERS, EXPERTS, WIDTH, HIDDEN, ROWS = 2, 3, 4, 5, 6
SIZES = np.array([4, 0, 2], np.int32)
ALPHA = 3.0


def network(params, x, sizes):
    def layer(x, p):
        hidden = jnp.tanh(jax.lax.ragged_dot(x, p["up"], sizes))
        return x + jax.lax.ragged_dot(hidden, p["down"], sizes), None

    return jax.lax.scan(layer, x, params)[0]


@pytest.fixture
def case():
    normal = np.random.default_rng(3).normal
    params = {
        "up": jnp.asarray(normal(size=(LAYERS, EXPERTS, WIDTH, HIDDEN)), jnp.float32),
        "down": jnp.asarray(normal(size=(LAYERS, EXPERTS, HIDDEN, WIDTH)), jnp.float32),
    }
    x = jnp.asarray(normal(size=(ROWS, WIDTH)), jnp.float32)
    targets = {"up": jlora.SharedLoRA(2, ALPHA), "down": jlora.SharedLoRA(2, ALPHA, shared="b")}
    sites = jlora.trace(network, params, x, SIZES)
    adapter = jlora.init(jax.random.key(0), sites, targets)
    adapter = jax.tree.map(lambda a: a + jnp.asarray(normal(size=a.shape), a.dtype), adapter)
    return params, x, sites, adapter


def test_layers_with_experts_have_a_shared_matrix_each(case):
    params, x, _, adapter = case
    up, down = adapter["up"].factors, adapter["down"].factors
    assert up["a"].shape == (LAYERS, WIDTH, 2)
    assert up["b"].shape == (LAYERS, EXPERTS, 2, HIDDEN)
    assert down["a"].shape == (LAYERS, EXPERTS, HIDDEN, 2)
    assert down["b"].shape == (LAYERS, 2, WIDTH)

    merged = jlora.merge(params, adapter)
    want = np.einsum("lir,lero->leio", up["a"], up["b"]) * ALPHA / 2
    np.testing.assert_allclose(merged["up"] - params["up"], want, atol=1e-5)
    want = np.einsum("leir,lro->leio", down["a"], down["b"]) * ALPHA / 2
    np.testing.assert_allclose(merged["down"] - params["down"], want, atol=1e-5)
    assert not jlora.explain(network, params, adapter, x, SIZES).dense
    check_law(network, params, adapter, x, SIZES, bound=1e-4)


def test_it_is_written_for_peft_with_the_shared_matrix_repeated(case, tmp_path):
    _, _, sites, adapter = case
    names = {name: f"layers.{{i}}.experts.{{e}}.{name}" for name in adapter}
    notes = jlora.peft.save(tmp_path / "experts", adapter, names, target="vllm")
    assert len(notes) == 2
    assert all("SharedLoRA became a LoRA of rank 2, by its factors" in note for note in notes)
    tensors = load_file(tmp_path / "experts" / "adapter_model.safetensors")
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            at = f"base_model.model.layers.{layer}.experts.{expert}"
            np.testing.assert_array_equal(tensors[f"{at}.up.lora_A.weight"], adapter["up"]["a"][layer].T)
            np.testing.assert_array_equal(tensors[f"{at}.up.lora_B.weight"], adapter["up"]["b"][layer, expert].T)
            np.testing.assert_array_equal(tensors[f"{at}.down.lora_A.weight"], adapter["down"]["a"][layer, expert].T)
            np.testing.assert_array_equal(tensors[f"{at}.down.lora_B.weight"], adapter["down"]["b"][layer].T)

    names = {name: Module(f"layers.{{i}}.experts.{name}", "parameter") for name in adapter}
    jlora.peft.save(tmp_path / "parameters", adapter, names)
    loaded = jlora.peft.load(tmp_path / "parameters", sites, names)
    assert loaded["up"]["a"].shape == (LAYERS, EXPERTS, WIDTH, 2)
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(loaded["up"]["a"][:, expert], adapter["up"]["a"])
        np.testing.assert_array_equal(loaded["down"]["b"][:, expert], adapter["down"]["b"])
    np.testing.assert_array_equal(loaded["up"]["b"], adapter["up"]["b"])
    np.testing.assert_array_equal(loaded["down"]["a"], adapter["down"]["a"])


def test_an_expert_without_rows_does_not_move(case):
    params, x, sites, adapter = case
    adapter = jlora.init(jax.random.key(1), sites, {path: update.method for path, update in adapter.items()})

    def loss(adapter):
        return jnp.square(jlora.adapt(network)(params, adapter, x, SIZES)).mean()

    for _ in range(2):  # the first step moves the factors that start at zero, the second those that are shared
        adapter = jax.tree.map(lambda a, g: a - g, adapter, jax.grad(loss)(adapter))
    merged = jlora.merge(params, adapter)
    for path in ("up", "down"):
        moved = np.abs(merged[path] - params[path]).max((0, 2, 3))
        np.testing.assert_array_equal(moved > 0, SIZES > 0)


def test_files_hold_the_shared_matrix_once(case, tmp_path):
    params, _, _, adapter = case
    jlora.save(tmp_path / "adapter", adapter, params=params)
    loaded = jlora.load(tmp_path / "adapter", params=params)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


@pytest.mark.parametrize("shared", ["a", "b"])
def test_without_experts_the_layers_of_a_scan_share(shared):
    params = {"w": jnp.ones((LAYERS, 4, 4))}
    sites = jlora.trace(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], params, jnp.ones((2, 4)))
    factors = jlora.init(jax.random.key(0), sites, jlora.SharedLoRA(2, shared=shared))["w"].factors
    other = "b" if shared == "a" else "a"
    assert factors[shared].shape == {"a": (4, 2), "b": (2, 4)}[shared]
    assert factors[other].shape == (LAYERS, *{"a": (4, 2), "b": (2, 4)}[other])


def test_shared_is_a_or_b():
    with pytest.raises(ValueError, match="shared"):
        jlora.SharedLoRA(2, shared="c")
