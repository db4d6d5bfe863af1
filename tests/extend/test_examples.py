"""The worked examples of extensions run as a user would run them; each ends with a check of the law."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

FOLDER = Path(__file__).parents[2] / "examples" / "extend"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_an_example_runs(name, capsys):
    module = runpy.run_path(str(FOLDER / f"{name}.py"))
    module["main"]()
    assert capsys.readouterr().out.endswith("adapted and merged agree\n")


def test_three_bits_against_numpy():
    """The packed bytes, read bit by bit in NumPy, are the rounded codes."""
    module = runpy.run_path(str(FOLDER / "three_bits.py"))
    weight = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    quantized = module["quantize"](jnp.asarray(weight))
    bits = np.unpackbits(np.asarray(quantized.packed), axis=-1, bitorder="little")
    codes = bits.reshape(2, 5, 16, 3) @ np.array([1, 2, 4])
    scale = np.abs(weight).max(axis=1, keepdims=True)
    expected = np.clip(np.round(weight / scale * np.float32(3.5) + np.float32(3.5)), 0, 7)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(quantized.dequantize(), (codes - 3.5) / 3.5 * scale, rtol=1e-6)


def test_a_method_outside_of_jlora_is_saved_by_its_module_and_name(tmp_path):
    module = runpy.run_path(str(FOLDER / "gated_lora.py"), run_name="gated_lora_of_a_user")
    params, x = {"w": jnp.ones((4, 6))}, jnp.ones((2, 4))
    sites = jlora.trace(lambda p, x: x @ p["w"], params, x)
    adapter = jlora.init(jax.random.key(0), sites, module["GatedLoRA"](rank=2))
    jlora.save(tmp_path / "adapter", adapter)
    assert "gated_lora_of_a_user.GatedLoRA" in (tmp_path / "adapter" / "jlora" / "metadata").read_text()
    assert type(jlora.load(tmp_path / "adapter")["w"].method) is module["GatedLoRA"]


def test_two_methods_of_the_same_name_are_refused():
    source = "class Twice(jlora.Method):\n    def lower(self, update, w):\n        return w\n"
    names = {"jlora": jlora, "__name__": "a_module_of_a_user"}
    exec(compile(source, "first.py", "exec"), names)
    exec(compile(source, "first.py", "exec"), names)  # the same lines again: the module was reloaded
    with pytest.raises(TypeError, match=r"two methods named a_module_of_a_user\.Twice: rename one"):
        exec(compile(source, "second.py", "exec"), names)


def test_a_class_named_as_one_of_jlora_replaces_nothing(tmp_path):
    class LoRA(jlora.Method):
        networks = ()

    params, x = {"w": jnp.ones((4, 6))}, jnp.ones((2, 4))
    adapter = jlora.init(jax.random.key(0), jlora.trace(lambda p, x: x @ p["w"], params, x), jlora.LoRA(rank=2))
    jlora.save(tmp_path / "adapter", adapter)
    assert jlora.load(tmp_path / "adapter")["w"].method == jlora.LoRA(rank=2)
    assert LoRA is not jlora.LoRA
