"""Files that another call reads, and arguments of the wrong kind: each error tells what to call or to pass."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.support import toy_model

NAMES = {"mix/kernel": "mix"}
J: Any = jlora  # calls that a type checker refuses


def adapter():
    return jlora.init(jax.random.key(0), toy_model.sites(), {"mix/kernel": jlora.LoRA(2)})


def test_a_folder_of_another_format_names_its_call(tmp_path):
    for file in ("peft/adapter_config.json", "bank/bank.json", "steps/100/jlora/metadata"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    for folder, message in (
        ("peft", "jlora.peft.load reads it"),
        ("bank", "jlora.bank.load"),
        ("steps", r"steps.100\."),
    ):
        with pytest.raises(jlora.CheckpointError, match=f"is not a saved adapter.*{message}"):
            jlora.load(tmp_path / folder)
    with pytest.raises(NotADirectoryError, match=r"is a file, and a saved adapter is a folder. jlora.info\(path\)"):
        jlora.load(tmp_path / "peft" / "adapter_config.json")


def test_an_adapter_without_values_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"kernel.* is of type ShapeDtypeStruct, which has no value"):
        jlora.save(tmp_path / "a", jax.eval_shape(adapter))
    with pytest.raises(TypeError, match=r"which has no value: save outside of jax.jit"):
        jax.jit(lambda a: jlora.save(tmp_path / "b", a))(adapter())


@pytest.mark.parametrize("load", ["peft", "kohya", "gguf", "loralib"])
def test_sites_and_names_change_places(load, tmp_path):
    call = getattr(jlora, load).load
    with pytest.raises(TypeError, match=r"`sites` must come from jlora.trace, not dict"):
        call(tmp_path, NAMES, toy_model.sites())
    with pytest.raises(TypeError, match=r"names is a dict from paths of the program to modules.*not list"):
        call(tmp_path, toy_model.sites(), ["mix"])


def test_names_that_lack_a_module_show_an_entry(tmp_path):
    jlora.peft.save(tmp_path / "peft", adapter(), NAMES)
    with pytest.raises(ValueError, match=r"An entry of names is a path of the program with its module: \{'layers"):
        jlora.peft.load(tmp_path / "peft", toy_model.sites(), {"mix/kernel": "mix.weight"})


def test_a_state_of_loralib_without_tensors():
    with pytest.raises(ValueError, match=r"The state has no tensors. Pass loralib.lora_state_dict\(model\)"):
        jlora.loralib.load({}, toy_model.sites(), NAMES)


def test_parameters_and_checkpoint_change_places():
    with pytest.raises(TypeError, match="a dict from names of tensors to arrays; the parameters come before it"):
        jlora.peft.infer_names({"mix.weight": jnp.ones((2, 2))}, toy_model.params())


def test_something_else_in_the_place_of_a_bank():
    bank, rows = jlora.bank.stack({"a": adapter()}), toy_model.tokens()
    with pytest.raises(TypeError, match="found one adapter"):
        J.bank.stack(adapter())
    with pytest.raises(TypeError, match="Expected a bank after the parameters, found dict"):
        J.bank.vmap(toy_model.model)(toy_model.params(), adapter(), rows)
    with pytest.raises(TypeError, match=r"bank.ids\(names\)"):
        jlora.bank.apply(toy_model.model)(toy_model.params(), bank, ["a", None], rows)


def test_a_start_from_gradients_gets_a_loss():
    with pytest.raises(TypeError, match=r"gradient returns the gradient .* and not ArrayImpl"):
        J.lora_ga(jax.random.key(0), adapter(), lambda adapter: jnp.ones(()))
