"""The language model of the examples against transformers, which reads the file by itself: see `golden/smollm.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import assets
import jlora
import smollm

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm.json").read_text())
CONVERSATIONS = GOLDEN["conversations"]
SMALL = smollm.Config(vocabulary=17, width=12, hidden=20, layers=3, heads=6, groups=2, epsilon=1e-5, rotary_base=100.0)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return smollm.load(assets.smollm())


def test_tokens_are_those_of_transformers(loaded: Any) -> None:
    _, tokenizer = loaded
    assert tokenizer.encode(GOLDEN["text"]).ids == GOLDEN["text_ids"]
    assert tokenizer.decode(GOLDEN["text_ids"]) == GOLDEN["text"]
    assert CONVERSATIONS
    for conversation in CONVERSATIONS:
        assert tokenizer.encode(smollm.chat(conversation["question"])).ids == conversation["ids"]


@pytest.mark.nightly
def test_replies_are_those_of_transformers(loaded: Any) -> None:
    model, _ = loaded
    graph, params = nnx.split(model)
    count = len(CONVERSATIONS[0]["reply"])
    assert CONVERSATIONS
    for conversation in CONVERSATIONS:
        prompt = jnp.asarray([conversation["ids"]])
        run = jax.jit(
            lambda params, prompt: smollm.generate(smollm.forward(graph), params, prompt, model.config, count)
        )
        assert np.asarray(run(params, prompt))[0].tolist() == conversation["reply"]
    last = CONVERSATIONS[-1]
    logits, _ = jax.jit(smollm.forward(graph))(params, jnp.asarray([last["ids"]]))
    np.testing.assert_allclose(logits[0, -1, ::3001], last["logits"], rtol=0, atol=1e-3)


def test_parameters_are_what_the_model_would_initialise(loaded: Any) -> None:
    model, _ = loaded
    params = nnx.to_pure_dict(nnx.state(model))
    expected = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: smollm.SmolLM(model.config, nnx.Rngs(0)))))
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008


def small() -> tuple[smollm.Forward, Any, jax.Array]:
    graph, params = nnx.split(smollm.SmolLM(SMALL, nnx.Rngs(0)))
    return smollm.forward(graph), params, jax.random.randint(jax.random.key(1), (2, 9), 0, SMALL.vocabulary)


def test_a_cache_changes_no_logit() -> None:
    forward, params, tokens = small()
    forward = jax.jit(forward)
    whole, none = forward(params, tokens)
    assert none is None
    cache, at, parts = smollm.empty_cache(SMALL, 2, 12), 0, []
    for length in (4, 1, 3, 1):
        logits, cache = forward(params, tokens[:, at : at + length], cache, at)
        parts.append(logits)
        at += length
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_warm_samples_follow_the_distribution() -> None:
    forward, params, tokens = small()
    prompts = jnp.repeat(tokens[:1], 4000, axis=0)
    drawn = smollm.generate(forward, params, prompts, SMALL, 1, temperature=2.0, key=jax.random.key(0))
    frequencies = np.bincount(np.asarray(drawn)[:, 0], minlength=SMALL.vocabulary) / len(drawn)
    expected = jax.nn.softmax(forward(params, tokens[:1])[0][0, -1] / 2.0)
    np.testing.assert_allclose(frequencies, expected, rtol=0, atol=0.03)


def test_generation_with_an_adapter_is_generation_with_merged_weights() -> None:
    forward, params, tokens = small()
    sites = jlora.trace(forward, params, tokens)
    adapter = jlora.init(jax.random.key(2), sites, {".*/kernel": jlora.LoRA(rank=2, start="orthogonal", alpha=40.0)})
    adapter = jax.tree.map(lambda factor: factor + 0.3, adapter)
    adapted = jlora.adapt(forward)
    merged = smollm.generate(forward, jlora.merge(params, adapter), tokens, SMALL, 6)
    both = smollm.generate(lambda pair, *args: adapted(*pair, *args), (params, adapter), tokens, SMALL, 6)
    assert np.array_equal(merged, both)
    assert not np.array_equal(merged, smollm.generate(forward, params, tokens, SMALL, 6))


def test_the_name_map_reaches_every_parameter(tmp_path: Path) -> None:
    forward, params, tokens = small()
    sites = jlora.trace(forward, params, tokens)
    adapter = jlora.init(jax.random.key(2), sites, {".*/kernel": jlora.LoRA(rank=2)})
    jlora.peft.save(tmp_path / "peft", adapter, jlora.peft.names.LLAMA_TIED)
    again = jlora.peft.load(tmp_path / "peft", sites, jlora.peft.names.LLAMA_TIED)
    assert set(again) == {path for path in sites if path.endswith("kernel")}
