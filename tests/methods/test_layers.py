"""`layers=` of a method: some layers of a stacked weight have factors, the others are those of the base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import methods, toy_model
from tests.support.agreement import close

KEY = jax.random.key(4)
PATHS = ("layers/up", "layers/down")
PARAMS, TOKENS = toy_model.params(), toy_model.tokens()
SOME: dict[str, Any] = {"slice": slice(1, None), "stepped": slice(None, None, 2), "negative": (-1, 0), "one": (1,)}
NUMBERS = {"slice": (1, 2), "stepped": (0, 2), "negative": (0, 2), "one": (1,)}


def adapter_of(method: jlora.Method, layers: Any, seed: int = 3) -> dict[str, jlora.Update]:
    targets = {"|".join(PATHS): dataclasses.replace(method, layers=layers)}
    return toy_model.random_adapter(toy_model.sites(), targets, seed, params=PARAMS)


@pytest.mark.parametrize(
    "layers", ["stepped", *(pytest.param(n, marks=pytest.mark.nightly) for n in SOME if n != "stepped")]
)
def test_the_law_and_the_formula(layers: str):
    adapter, chosen = adapter_of(jlora.LoRA(2, 3.0), SOME[layers]), NUMBERS[layers]
    merged = jlora.merge(PARAMS, adapter)
    for path in PATHS:
        update, name = adapter[path], path.rpartition("/")[2]
        assert update.method.layers == chosen
        a, b = (np.asarray(update.factors[f], np.float64) for f in "ab")
        assert len(a) == len(b) == len(chosen)
        expected = np.asarray(PARAMS["layers"][name], np.float64).copy()
        expected[list(chosen)] += 1.5 * a @ b
        close(merged["layers"][name], expected, 1e-6)

    def loss(run: Any) -> Any:
        return lambda adapter: jnp.sum(run(adapter) ** 2)

    adapted = loss(lambda adapter: jlora.adapt(toy_model.model, on_dense="error")(PARAMS, adapter, TOKENS))
    by_merging = loss(lambda adapter: toy_model.model(jlora.merge(PARAMS, adapter), TOKENS))
    got, want = (jax.jit(jax.value_and_grad(f))(adapter) for f in (adapted, by_merging))
    jax.tree.map(lambda x, y: close(x, y, 1e-4), got, want)


@pytest.mark.parametrize("name", methods.some("layers", "dora", "oft"))
def test_each_method_acts_as_on_a_smaller_stack(name: str):
    method = methods.fitting(name, toy_model.sites()["layers/up"])
    chosen = np.array([0, 2])
    adapter = toy_model.random_adapter(
        toy_model.sites(), {"layers/up": dataclasses.replace(method, layers=(0, 2))}, params=PARAMS
    )
    merged = jlora.merge(PARAMS, adapter)["layers"]["up"]
    base = PARAMS["layers"]["up"]
    assert np.array_equal(merged[1], base[1])
    part = adapter["layers/up"].part
    assert part.shape == (2, *base.shape[1:])
    close(merged[chosen], jlora.merge({"w": base[chosen]}, {"w": part})["w"], 1e-6)
    want = toy_model.model({**PARAMS, "layers": {**PARAMS["layers"], "up": merged}}, TOKENS)
    close(jax.jit(jlora.adapt(toy_model.model, on_dense="allow"))(PARAMS, adapter, TOKENS), want, 1e-4)


@pytest.mark.nightly
def test_several_adapters_apply_in_order():
    first, second = adapter_of(jlora.LoRA(2), (0, 1)), adapter_of(jlora.DoRA(1), (1, 2), seed=8)
    want = jlora.merge(jlora.merge(PARAMS, first), second)
    jax.tree.map(lambda x, y: close(x, y, 1e-6), jlora.merge(PARAMS, [first, second]), want)
    got = jlora.adapt(toy_model.model)(PARAMS, [first, second], TOKENS)
    close(got, toy_model.model(want, TOKENS), 1e-4)


def test_all_layers_are_no_choice():
    method = jlora.LoRA(2, layers=slice(None))
    assert jlora.init(KEY, toy_model.sites(), {"layers/up": method})["layers/up"].method == jlora.LoRA(2)


def test_dropout_differs_from_layer_to_layer():
    adapter = jlora.with_dropout(adapter_of(jlora.LoRA(2, dropout=0.5), (0, 2)), KEY)
    assert adapter["layers/up"].key.shape == (2,)
    outputs = [jlora.adapt(toy_model.model)(PARAMS, a, TOKENS) for a in (adapter, adapter_of(jlora.LoRA(2), (0, 2)))]
    assert not np.allclose(*outputs)


def test_a_checkpoint(tmp_path: Path):
    adapter = adapter_of(jlora.LoRA(2), slice(-2, None))
    jlora.save(tmp_path / "adapter", adapter)
    loaded = jlora.load(tmp_path / "adapter")
    assert loaded["layers/up"].method == jlora.LoRA(2, layers=(1, 2))
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(adapter)))


@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.DoRA(2)], ids=repr)
def test_files_of_peft_have_the_modules_of_these_layers(method: jlora.Method, tmp_path: Path):
    adapter = adapter_of(method, (0, 2))
    names = {"layers/up": "model.layers.{i}.up", "layers/down": "model.layers.{i}.down"}
    assert jlora.peft.save(tmp_path / "file", adapter, names, params=PARAMS) == ()
    modules = json.loads((tmp_path / "file" / "adapter_config.json").read_text())["target_modules"]
    loaded = jlora.peft.load(tmp_path / "file", toy_model.sites(), names, params=PARAMS)
    assert sorted(modules) == [f"model.layers.{i}.{name}" for i in (0, 2) for name in ("down", "up")]
    want = jlora.merge(PARAMS, adapter)
    jax.tree.map(lambda x, y: close(x, y, 1e-6), jlora.merge(PARAMS, loaded), want)


@pytest.mark.nightly
def test_a_bank_of_members_with_other_layers():
    members = {"some": adapter_of(jlora.LoRA(2), (0, 2)), "all": adapter_of(jlora.LoRA(1), None, seed=5)}
    bank = jlora.bank.stack(members)
    out = jax.jit(jlora.bank.apply(toy_model.model))(PARAMS, bank, bank.ids(["all", "some"]), TOKENS)
    for row, name in enumerate(["all", "some"]):
        want = toy_model.model(jlora.merge(PARAMS, members[name]), TOKENS[row : row + 1])[0]
        close(out[row], want, 1e-4)


@pytest.mark.nightly
def test_starts_of_these_layers_alone():
    adapter = jlora.init(KEY, toy_model.sites(), {"layers/(up|down)": jlora.LoRA(2, layers=(0, 2))})
    whole = jlora.init(KEY, toy_model.sites(), {"layers/(up|down)": jlora.LoRA(2)})
    inputs = jlora.calibrate(toy_model.model, whole)(PARAMS, TOKENS)
    inputs_of_some = jlora.calibrate(toy_model.model, adapter)(PARAMS, TOKENS)
    started = jlora.corda(adapter, inputs_of_some, PARAMS, mode="knowledge")
    want = jlora.corda(whole, inputs, PARAMS, mode="knowledge")
    close(started["layers/up"]["a"], want["layers/up"]["a"][np.array([0, 2])], 1e-5)
    pissa = jlora.init(KEY, toy_model.sites(), {"layers/up": jlora.LoRA(2, start="pissa", layers=(1,))}, params=PARAMS)
    u, s, vt = np.linalg.svd(np.asarray(PARAMS["layers"]["up"][1], np.float64))
    close(pissa["layers/up"]["a"] @ pissa["layers/up"]["b"], ((u[:, :2] * s[:2]) @ vt[:2])[None], 1e-5)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (slice(1, 9), "9 is not one"),
        ((0, 3), "3 is not one"),
        ((-4,), "-4 is not one"),
        ((0, -3), "one is given twice"),
        ((), "that is none of them"),
        (slice(2, 1), "that is none of them"),
    ],
    ids=str,
)
def test_layers_that_do_not_exist(layers: Any, problem: str):
    with pytest.raises(ValueError, match=f"layers/up has 3 layers, 0 to 2, and layers=.*: {problem}"):
        jlora.init(KEY, toy_model.sites(), {"layers/up": jlora.LoRA(2, layers=layers)})


def test_a_weight_without_a_stack():
    with pytest.raises(ValueError, match=r"mix/kernel \(8, 8\) has no stack axis"):
        jlora.init(KEY, toy_model.sites(), {"mix/kernel": jlora.LoRA(2, layers=(0,))})


@pytest.mark.parametrize("layers", [3, "1:2", (True,), (1.0,), slice(0, 1.5)], ids=str)
def test_layers_that_are_no_numbers(layers: Any):
    with pytest.raises(ValueError, match="LoRA's layers are a slice, a tuple of their numbers, or None"):
        jlora.LoRA(2, layers=layers)
