"""Names that are found from values if tensors are equal: what neighbours decide, and what is asked for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jlora
from tests.support.llama_layouts import (
    AT,
    LAYOUTS,
    D,
    F,
    L,
    assert_rebuilt,
    llama,
    located,
    numbers,
    plain,
    stacked,
)


@pytest.mark.parametrize("layout", ["plain", "stacked", "fused and stacked"])
def test_equal_tensors_are_told_apart(layout):
    """All norms are ones: the scopes of layers, and one norm that both sides call the same, decide."""
    state = llama(constant_norms=True)
    params = LAYOUTS[layout](state)
    names = jlora.peft.infer_names(params, state)
    assert located(names, params) == located(jlora.peft.infer_names(LAYOUTS[layout](llama()), llama()), params)


def without_words(params: dict[str, Any]) -> dict[str, Any]:
    """The norms have names that say nothing."""
    renamed = {"input_norm": "first", "other_norm": "second"}
    return params | {"layers": [{renamed.get(k, k): v for k, v in layer.items()} for layer in params["layers"]]}


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_choice_that_is_asked_for(is_stacked, tmp_path):
    state = llama(constant_norms=True)
    params = without_words(plain(state))
    params = stacked(params) if is_stacked else params
    names = jlora.peft.infer_names(params, state)
    first, second = (
        ("layers/first/scale", "layers/second/scale")
        if is_stacked
        else ("layers/1/first/scale", "layers/1/second/scale")
    )
    assert {first, second} <= set(names.ambiguous)
    assert not names.complete
    assert set(names.ambiguous[first]) == set(names.ambiguous[second])
    with pytest.raises(ValueError, match=r"first/scale may be any of model.layers.0.input_layernorm.*known="):
        names.check()
    shape = np.asarray(names.shapes[first])
    adapter = {first: jlora.Update({"d": np.ones(shape, np.float32)}, jlora.Full(), (), tuple(shape))}
    with pytest.raises(ValueError, match=rf"{first} may be any of .*same values.*known={{'{first}'"):
        jlora.peft.save(tmp_path / "a", adapter, names)
    pattern = "layers/first/scale" if is_stacked else "layers/{i}/first/scale"
    known = {pattern: "model.layers.{i}.post_attention_layernorm.weight"}
    told = jlora.peft.infer_names(params, state, known=known).check()
    assert told[pattern].name == known[pattern]
    assert told[pattern.replace("first", "second")].name == "model.layers.{i}.input_layernorm.weight"


@pytest.mark.parametrize("saved_twice", [False, True])
@pytest.mark.parametrize("used_twice", [False, True])
def test_tied_weights(saved_twice, used_twice):
    """The head has a tensor of its own with the same values, or none; the program has one weight or two."""
    state = llama()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    params = plain(state)
    state = state if saved_twice else {k: v for k, v in state.items() if k != "lm_head.weight"}
    params = params if used_twice else {k: v for k, v in params.items() if k != "head"}
    tied = None if saved_twice or used_twice else {"embed/embedding": "lm_head"}
    names = jlora.peft.infer_names(params, state, tied=tied)
    assert_rebuilt(names, params, state)
    embedding = names["embed/embedding"]
    assert embedding.name == "model.embed_tokens"
    if used_twice and saved_twice:
        assert names["head/kernel"] == "lm_head"
    elif used_twice:
        assert "head/kernel" not in names
        assert names.shared == {"head/kernel": "embed/embedding"}
        assert (names | {"head/kernel": "lm_head"})["head/kernel"] == "lm_head"
    else:
        assert embedding.tied == "lm_head"
        assert names.copies == ({"lm_head.weight": "model.embed_tokens.weight"} if saved_twice else {})


def test_biases_of_zeros():
    """A bias is told by its weight; one without a tensor is constant and has no entry."""
    state = llama() | {f"{AT(i)}mlp.up_proj.bias": np.zeros(F, np.float32) for i in range(L)}
    params = plain(state)
    for layer in params["layers"]:
        layer["mlp"]["up"]["bias"] = np.zeros(F, np.float32)
        layer["mlp"]["gate"]["bias"] = np.zeros(F, np.float32)
    names = jlora.peft.infer_names(stacked(params), state)
    assert names["layers/mlp/up/bias"].name == "model.layers.{i}.mlp.up_proj.bias"
    assert names.constant == {"layers/mlp/gate/bias": 0.0}
    assert names.complete


def test_a_file_for_a_parameter_without_an_entry(tmp_path):
    """Loading says what to write for a tensor of the file whose parameter is ambiguous."""
    state = llama(constant_norms=True)
    params = {"first": {"scale": np.ones(D, np.float32)}, "second": {"scale": np.ones(D, np.float32)}}
    params |= {"up": {"kernel": state[f"{AT(0)}mlp.up_proj.weight"].T}}
    state = {
        name: state[name]
        for name in (f"{AT(0)}{n}.weight" for n in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj"))
    }
    names = jlora.peft.infer_names(params, state)
    sites = jlora.trace(
        lambda p, x: (x * p["first"]["scale"][None] * p["second"]["scale"][None]) @ p["up"]["kernel"],
        params,
        numbers(2, D),
    )
    told = names | {
        f"{which}/scale": jlora.peft.Module(f"{AT(0)}{n}.weight", "parameter")
        for which, n in (("first", "input_layernorm"), ("second", "post_attention_layernorm"))
    }
    adapter = jlora.init(jax.random.key(0), sites, {"up/kernel": jlora.LoRA(2), ".*/scale": jlora.Full()})
    jlora.peft.save(tmp_path / "a", adapter, told, params=params)
    with pytest.raises(ValueError, match=r"(?s)no weight in the program.*write known={'first/scale': 'model.layers.0"):
        jlora.peft.load(tmp_path / "a", sites, names, params=params)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"nowhere/kernel": "lm_head.weight"}, "matches no path"),
        ({"head/kernel": "lm_haed.weight"}, "has no such tensor"),
        (
            {"head/kernel": "model.embed_tokens.weight"},
            "head/kernel the tensor model.embed_tokens.weight, and it has other",
        ),
    ],
)
def test_known_that_is_refused(known, message):
    state = llama()
    with pytest.raises(ValueError, match=message):
        jlora.peft.infer_names(plain(state), state, known=known)


def test_a_choice_for_every_other_layer():
    """Two stacks, of the even and of the odd layers, whose norms of ones have names that say nothing."""
    state = llama(constant_norms=True)
    layers = without_words(plain(state))["layers"]
    params = plain(state) | {"layers": [stacked({"layers": layers[k::2]})["layers"] for k in (0, 1)]}
    known = {"layers/{i}/second/scale": "model.layers.{i+2*j}.post_attention_layernorm"}
    names = jlora.peft.infer_names(params, state, known=known)
    assert_rebuilt(names, params, state)
    assert names["layers/{i}/first/scale"].name == "model.layers.{i+2*j}.input_layernorm.weight"
    assert names["layers/{i}/second/scale"].name == "model.layers.{i+2*j}.post_attention_layernorm.weight"


def test_a_tensor_elsewhere_is_no_proof():
    """A norm of ones whose tensor is kept with the embeddings: it is asked for, and not called constant."""
    state = llama(constant_norms=True)
    state["model.embed_tokens.norm.weight"] = state.pop("model.norm.weight")
    state["model.embed_tokens.positions.weight"] = numbers(5, D)
    params = plain(state | {"model.norm.weight": np.ones(D, np.float32)})
    params["embed"]["positions"] = {"embedding": state["model.embed_tokens.positions.weight"]}
    names = jlora.peft.infer_names(params, state)
    assert names.ambiguous == {"norm/scale": ("model.embed_tokens.norm.weight",)}
    assert names.constant == {}
