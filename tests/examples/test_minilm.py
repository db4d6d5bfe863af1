"""The encoder of the examples against embeddings that torch operations made: see `golden/minilm.py`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import assets
import jlora
import minilm
import reviews

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "minilm.json").read_text())


@pytest.fixture(scope="module")
def folder() -> Path:
    return assets.minilm()


@pytest.fixture(scope="module")
def embeddings(folder: Path) -> np.ndarray:
    model, variables = minilm.load(folder)
    ids, mask = reviews.encode(folder / "tokenizer.json", GOLDEN["sentences"], GOLDEN["length"])
    return np.asarray(jax.jit(model.apply)(variables, ids, mask))


def test_tokens_are_those_of_the_golden_file(folder: Path) -> None:
    ids, mask = reviews.encode(folder / "tokenizer.json", GOLDEN["sentences"], GOLDEN["length"])
    for row, real, expected in zip(ids, mask, GOLDEN["ids"], strict=True):
        assert row[: real.sum()].tolist() == expected
        assert not row[real.sum() :].any()
    assert mask.sum(axis=1).max() == GOLDEN["length"], "no sentence is cut: the cut is not tested"


def test_embeddings_agree_with_torch(embeddings: np.ndarray) -> None:
    # The golden sentences were embedded one at a time: agreement says that padding changes nothing, too.
    expected = np.array(GOLDEN["embeddings"])
    assert embeddings.shape == expected.shape == (len(GOLDEN["sentences"]), 384)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)


def test_a_paraphrase_is_near_and_an_unrelated_sentence_is_not(embeddings: np.ndarray) -> None:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert unit[0] @ unit[1] == pytest.approx(0.755, abs=1e-3)
    assert unit[0] @ unit[2] == pytest.approx(0.0, abs=1e-2)
    assert unit[0] @ unit[1] == pytest.approx(GOLDEN["cosines"]["paraphrase"], abs=1e-5)
    assert unit[0] @ unit[2] == pytest.approx(GOLDEN["cosines"]["unrelated"], abs=1e-5)


def test_variables_are_what_the_model_would_initialise(folder: Path) -> None:
    model, variables = minilm.load(folder)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    expected = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)
    assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 22_565_376


@pytest.mark.nightly
def test_the_layers_below_and_the_upper_part_compute_what_the_encoder_computes() -> None:
    encoder = minilm.MiniLM(vocabulary=9, positions=6, types=2, width=8, layers=3, heads=2, hidden=12, epsilon=1e-6)
    ids = jnp.arange(12).reshape(2, 6) % 9
    mask = jnp.ones((2, 6), jnp.int32).at[1, 4:].set(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = jax.jit(encoder.init)(jax.random.key(0), ids, mask)
        expected = jax.jit(encoder.apply)(variables, ids, mask)
        for first in (1, 2):
            states = minilm.lower(encoder, first)(variables, ids, mask)
            params = {"params": {f"layer_{i}": variables["params"][f"layer_{i}"] for i in range(first, 3)}}
            upper = jax.jit(minilm.Upper(encoder, first).apply)(params, states, mask)
            np.testing.assert_allclose(upper, expected, rtol=0, atol=1e-6)


def test_the_names_are_found_in_the_file(folder: Path) -> None:
    _, variables = minilm.load(folder)
    names = jlora.peft.infer_names(variables, folder).check()
    written = jlora.peft.names.under("params/", jlora.peft.names.BERT)
    assert dict(names) == {pattern: written[pattern] for pattern in names}
    assert names.unused == ("pooler.dense.bias", "pooler.dense.weight")
    assert len(names.leaves) == len(jax.tree.leaves(variables))


@pytest.mark.nightly
def test_the_names_of_a_rounded_and_scanned_model_are_found(folder: Path) -> None:
    """All layers in one array, query, key and value in one kernel, in bfloat16: no map exists for it."""
    _, variables = minilm.load(folder)
    params = dict(variables["params"])
    layers = [params.pop(f"layer_{i}") for i in range(6)]
    for layer in layers:
        attention = layer["attention"]
        heads = [attention.pop(name) for name in ("query", "key", "value")]
        attention["qkv"] = jax.tree.map(lambda *parts: jnp.stack(parts, parts[0].ndim - 2), *heads)
    params["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    names = jlora.peft.infer_names(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), folder).check()
    assert names["layers/attention/qkv/kernel"] == tuple(
        f"encoder.layer.{{i}}.attention.self.{name}" for name in ("query", "key", "value")
    )
    assert names["layers/feed_forward/up/kernel"] == "encoder.layer.{i}.intermediate.dense"
    assert not names.inexpressible
