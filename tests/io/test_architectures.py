"""Ready maps and inferred ones against the tensors of real models, which `golden/architectures.py` recorded."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest

import jlora
from jlora.io.torch.weight_location import Weight, locate_weights
from jlora.peft import names as maps
from tests.support.architectures import flax_leaves, golden, nested, stacked, state

LIBRARIES = ("torch", "transformers", "peft")
MAPS: dict[str, Any] = {
    "bert": maps.BERT,
    "gpt2": maps.GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), maps.LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), maps.GEMMA),
    "mixtral": maps.MIXTRAL,
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), maps.QWEN_MOE),
    **{"t5": maps.T5_TIED, "t5_gated": maps.T5_TIED, "umt5": maps.T5_TIED},
    **{"vit": maps.VIT, "clip": maps.CLIP, "whisper": maps.WHISPER},
}


def layouts(model: str, tensors: dict[str, np.ndarray]) -> list[dict[str, tuple[list[str], np.ndarray]]]:
    """A path for each layer, and all layers in one array."""
    plain = flax_leaves(model, tensors)
    return [{path: ([name], value) for path, (name, value) in plain.items()}, stacked(plain)]


def located(names: Any, leaves: dict[str, tuple[list[str], np.ndarray]]) -> dict[str, Any]:
    """Tensors, kind and tied head of every parameter, by a map."""
    locations = locate_weights(names, {path: Weight(value.shape, ()) for path, (_, value) in leaves.items()})
    out = {}
    for path, at in locations.items():
        ending = "" if at.module.kind == "parameter" else ".weight"
        out[path] = [module + ending for (module,) in at.modules.values()], at.module.kind, at.module.tied
    return out


@pytest.mark.parametrize("model", MAPS)
def test_ready_maps(model):
    """Every parameter has its tensors, and the kind that values give it; the tied heads are those of transformers."""
    for leaves in layouts(model, state(model)):
        entries = located(MAPS[model], leaves)
        assert {path: tensors for path, (tensors, _, _) in entries.items()} == {p: t for p, (t, _) in leaves.items()}
        params = nested({path: value for path, (_, value) in leaves.items()})
        inferred = located(jlora.peft.infer_names(params, state(model)), leaves)
        kinds = {path: kind for path, (_, kind, _) in inferred.items()}
        if model == "gpt2":  # whose Flax kernels are (out, in), so that the program's axes have to tell
            kinds = {path: "conv1d" if kind == "linear" else kind for path, kind in kinds.items()}
        assert {path: kind for path, (_, kind, _) in entries.items()} == kinds
        heads = {f"{head}.weight": tensors[0] for tensors, _, head in entries.values() if head}
        shared = golden()[model].get("tied", {})
        assert heads == {head: name for head, name in shared.items() if "embed_tokens" not in head}


@pytest.mark.parametrize("model", golden())
def test_inferred_names(model):
    """A new model, with norms of ones and biases of zeros: every parameter has the tensor that it is made of."""
    tensors = state(model, initial=True)
    for leaves in layouts(model, tensors):
        params = nested({path: value for path, (_, value) in leaves.items()})
        names = jlora.peft.infer_names(params, tensors).check()
        assert {path: [piece.tensor for piece in pieces] for path, pieces in names.leaves.items()} == {
            path: tensors for path, (tensors, _) in leaves.items()
        }
        assert names.unused == ()
        for path, (_, value) in leaves.items():
            np.testing.assert_array_equal(names.parameter(path, tensors.__getitem__), value)


@pytest.mark.parametrize("initial", [False, True])
def test_heads_of_a_fused_module(initial):
    """GPT-NeoX has query, key and value of each head in turns; the program has a kernel and a bias for each."""
    tensors = state("gpt_neox", initial=initial)
    params = {}
    for path, (_, value) in flax_leaves("gpt_neox", tensors).items():
        if "query_key_value" not in path:
            params[path] = value
            continue
        for k, name in enumerate(("query", "key", "value")):
            params[path.replace("query_key_value", name)] = value.reshape(*value.shape[:-1], 4, 3, 4)[..., k, :]
    names = jlora.peft.infer_names(nested(params), tensors).check()
    for path, value in params.items():
        np.testing.assert_array_equal(names.parameter(path, tensors.__getitem__), value)
    assert names.unused == ()
    assert all("query" in path or "key" in path or "value" in path for path in names.inexpressible)


def test_a_parameter_for_each_expert():
    """Mixtral has all experts in one tensor, gate and up in one; the program has three kernels for each expert."""
    tensors = state("mixtral")
    params = {path: value for path, (_, value) in flax_leaves("mixtral", tensors).items() if "experts" not in path}
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts"
        for e in range(3):
            gate, up = np.split(tensors[f"{at}.gate_up_proj"][e].T, 2, 1)
            parts = {"w1": gate, "w3": up, "w2": tensors[f"{at}.down_proj"][e].T}
            params |= {f"{at.replace('.', '/')}/{e}/{name}/kernel": value for name, value in parts.items()}
    names = jlora.peft.infer_names(nested(params), tensors).check()
    for path, value in params.items():
        np.testing.assert_array_equal(names.parameter(path, tensors.__getitem__), value)


def test_another_model():
    """The weights of one model are not found in another, though many have the same shapes."""
    leaves = flax_leaves("llama", state("llama"))
    with pytest.raises(ValueError, match=r"(?s)another model.*near misses: model.embed_tokens.weight"):
        jlora.peft.infer_names(nested({path: value + 1 for path, (_, value) in leaves.items()}), state("mistral"))


def test_a_head_of_its_own():
    assert maps.T5["lm_head/kernel"] == "lm_head"
    assert "lm_head/kernel" not in maps.T5_TIED
    assert maps.LLAMA["model/embed_tokens/embedding"] == jlora.peft.Module("model.embed_tokens", "embedding")


def test_a_model_inside_of_another():
    names = maps.under("params/bert/", maps.BERT, "bert.")
    assert names["params/bert/pooler/dense/kernel"] == "bert.pooler.dense"
    inside = maps.under("language/", maps.GEMMA, "language_model.")["language/model/embed_tokens/embedding"]
    assert inside == jlora.peft.Module("language_model.model.embed_tokens", "embedding", tied="language_model.lm_head")


if all(importlib.util.find_spec(library) for library in LIBRARIES):

    def test_live_architectures():
        """The golden file holds what its script makes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tests.golden import architectures
        assert architectures.records() == golden()

    @pytest.mark.parametrize("model", ["qwen3", "gpt2", "whisper"])
    def test_live_files(model, tmp_path):
        """The files that transformers writes, in several shards; heads that are tied have no tensor there."""
        import torch  # pyright: ignore[reportMissingImports]

        from tests.golden import architectures

        made = architectures.MODELS[model]()
        with torch.no_grad():
            for tensor in made.parameters():
                tensor.normal_()
        made.save_pretrained(tmp_path, max_shard_size="10KB")  # pyright: ignore[reportCallIssue]
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        kept = set(state(model))
        tensors = {name: tensor.numpy() for name, tensor in made.state_dict().items() if name in kept}
        leaves = flax_leaves(model, tensors)
        names = jlora.peft.infer_names(nested({path: value for path, (_, value) in leaves.items()}), tmp_path).check()
        assert {path: pieces[0].tensor for path, pieces in names.leaves.items()} == {
            p: t for p, (t, _) in leaves.items()
        }
        heads = [entry.tied for entry in names.values() if getattr(entry, "tied", None)]
        assert heads == (["lm_head"] if model == "gpt2" else [])
