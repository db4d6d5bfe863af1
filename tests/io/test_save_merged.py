"""Merged models in the files of a Hugging Face checkpoint: the same files, with the values of the merged parameters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import assets
import jlora
import minilm
from jlora.io.torch.tensor_files import read_header

D, F, L, V = 12, 20, 3, 30
State = dict[str, np.ndarray]
IDS = jax.ShapeDtypeStruct((2, 3), jnp.int32)


def checkpoint(folder: Path, dtype: Any = np.float32, shards: int = 2, tied: bool = False) -> State:
    """A small causal language model: square and non-square weights, biases, a tied or an untied head."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed.weight": (V, D), "model.norm.weight": (D,), "pooler.weight": (D, D)}
    for i in range(L):
        shapes |= {f"model.layers.{i}.q.weight": (D, D), f"model.layers.{i}.k.weight": (D, D)}
        shapes |= {f"model.layers.{i}.up.weight": (F, D), f"model.layers.{i}.down.weight": (D, F)}
        shapes |= {f"model.layers.{i}.up.bias": (F,)}
    state = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    state["lm_head.weight"] = state["model.embed.weight"].copy() if tied else rng.normal(size=(V, D)).astype(dtype)
    state["model.positions"] = np.arange(7)
    folder.mkdir()
    names = list(state)
    files = {f"model-{k + 1:05}-of-{shards:05}.safetensors": names[k::shards] for k in range(shards)}
    files = files if shards > 1 else {"model.safetensors": names}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"hidden_size": 12}')
    (folder / "nested").mkdir()
    (folder / "nested" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights of the base")
    return state


def params_of(state: State, *, stacked: bool = False, tied: bool = False) -> dict[str, Any]:
    def layer(i: int) -> dict[str, Any]:
        at = f"model.layers.{i}."
        kernels = {name: {"kernel": state[f"{at}{name}.weight"].T} for name in ("up", "down")}
        kernels["up"]["bias"] = state[f"{at}up.bias"]
        q, k = (state[f"{at}{name}.weight"].T for name in ("q", "k"))
        return {**kernels, "qk": {"kernel": np.concatenate([q, k], 1)}}

    layers = [layer(i) for i in range(L)]
    params: dict[str, Any] = {"embed": {"embedding": state["model.embed.weight"]}}
    params["norm"] = {"scale": state["model.norm.weight"]}
    params["layers"] = jax.tree.map(lambda *a: np.stack(a), *layers) if stacked else layers
    if not tied:
        params["head"] = {"kernel": state["lm_head.weight"].T}
    return jax.tree.map(jnp.asarray, params)


def apply(params: Any, ids: jax.Array) -> jax.Array:
    x = params["embed"]["embedding"][ids]
    layers, head = params["layers"], params.get("head")

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        q, k = jnp.split(x @ p["qk"]["kernel"], 2, -1)
        h = jnp.tanh(q * k) @ p["up"]["kernel"]
        return jnp.tanh(h + p["up"]["bias"].reshape((1,) * (h.ndim - 1) + (-1,))) @ p["down"]["kernel"], None

    if isinstance(layers, list):
        for p in layers:
            x, _ = layer(x, p)
    else:
        x, _ = jax.lax.scan(layer, x, layers)
    x = x * params["norm"]["scale"].reshape(1, 1, -1)
    return x @ (head["kernel"] if head else params["embed"]["embedding"].T)


def merged_with_random(params: Any) -> Any:
    sites = jlora.trace(apply, params, IDS)
    adapter = jlora.init(jax.random.key(0), sites, {".*(kernel|embedding)": jlora.LoRA(2), ".*bias": jlora.Full()})
    rng = np.random.default_rng(1)
    adapter = jax.tree.map(lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape).astype(np.float32)), adapter)
    return jlora.merge(params, adapter)


def by_hand(i: str = "{i}") -> dict[str, Any]:
    at, parameter = "model.layers.{i}.", jlora.peft.Module
    return {
        "embed/embedding": parameter("model.embed", "embedding", tied="lm_head"),
        "norm/scale": parameter("model.norm.weight", "parameter"),
        f"layers{i}/qk/kernel": [f"{at}q", f"{at}k"],
        f"layers{i}/up/kernel": f"{at}up",
        f"layers{i}/up/bias": parameter(f"{at}up.bias", "parameter"),
        f"layers{i}/down/kernel": f"{at}down",
        "head/kernel": "lm_head",
    }


@pytest.mark.drawn(3)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("hand", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_files_of_the_checkpoint_with_merged_values(tmp_path, stacked, hand, tied):
    like, target = tmp_path / "base", tmp_path / "merged"
    state = checkpoint(like, shards=1 + hand, tied=tied)
    params = params_of(state, stacked=stacked, tied=tied)
    merged = merged_with_random(params)
    names = by_hand("" if stacked else "/{i}") if hand else jlora.peft.infer_names(params, like)
    unused = jlora.hf.save_merged(target, merged, names, like=like)

    assert unused == ("pooler.weight",)
    files = {str(f.relative_to(like)) for f in like.rglob("*") if f.is_file()} - {"pytorch_model.bin"}
    assert {str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()} == files
    for file in files:
        old, new = (like / file).read_bytes(), (target / file).read_bytes()
        length = 8 + int.from_bytes(old[:8], "little") if file.endswith(".safetensors") else len(old)
        assert len(old) == len(new)
        assert old[:length] == new[:length]  # headers, configuration and index
    saved = {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
    assert saved.keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, params_of(saved, stacked=stacked, tied=tied), merged)
    np.testing.assert_array_equal(saved["pooler.weight"], state["pooler.weight"])
    np.testing.assert_array_equal(saved["model.positions"], state["model.positions"])
    assert not np.array_equal(saved["lm_head.weight"], state["lm_head.weight"])
    if tied:
        np.testing.assert_array_equal(saved["lm_head.weight"], saved["model.embed.weight"])


def test_numbers_that_did_not_change_keep_all_their_bits(tmp_path):
    """A float32 checkpoint whose program runs in bfloat16: only what the adapter changes is rounded."""
    state = checkpoint(tmp_path / "base")
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params_of(state))
    names = jlora.peft.infer_names(params, tmp_path / "base")
    merged = jax.tree.map(lambda a: a, params)
    merged["layers"][0]["up"]["kernel"] = params["layers"][0]["up"]["kernel"].at[0, 1].add(1)
    jlora.hf.save_merged(tmp_path / "merged", merged, names, like=tmp_path / "base")
    saved = {k: v for file in (tmp_path / "merged").glob("*.safetensors") for k, v in load_file(file).items()}
    changed = {name: np.argwhere(saved[name] != state[name]).tolist() for name in state}
    assert {name: where for name, where in changed.items() if where} == {"model.layers.0.up.weight": [[1, 0]]}
    expected = np.asarray(merged["layers"][0]["up"]["kernel"][0, 1], np.float32)
    assert saved["model.layers.0.up.weight"][1, 0] == expected


def test_the_dtype_of_the_checkpoint(tmp_path):
    state = checkpoint(tmp_path / "base", ml_dtypes.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), params_of(state))
    merged = merged_with_random(params)
    names = jlora.peft.infer_names(params, tmp_path / "base")
    jlora.hf.save_merged(tmp_path / "merged", merged, names, like=tmp_path / "base")
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            names_in_file = list(tensors.keys())
            assert {tensors.get_slice(n).get_dtype() for n in names_in_file} <= {"BF16", "I64"}
            if "model.layers.1.up.weight" in names_in_file:
                up = read_header(file)["model.layers.1.up.weight"].read()
                expected = np.asarray(merged["layers"][1]["up"]["kernel"]).T.astype(ml_dtypes.bfloat16)
                np.testing.assert_array_equal(up, expected)


def refused(tmp_path: Path, change: Any, pattern: str, dtype: Any = np.float32) -> None:
    state = checkpoint(tmp_path / "base", dtype)
    params = params_of(state)
    names = jlora.peft.infer_names(params, tmp_path / "base")
    params, names = change(params, names)
    with pytest.raises((ValueError, OSError, TypeError), match=pattern):
        jlora.hf.save_merged(tmp_path / "merged", params, names, like=tmp_path / "base")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base"]


def renamed(params: Any, **fields: Any) -> Any:
    return {**params, **fields}


CASES = {
    "another shape": (lambda p, n: (renamed(p, norm={"scale": jnp.ones(D + 1)}), n), "norm/scale has shape"),
    "a parameter that the checkpoint lacks": (
        lambda p, n: (renamed(p, classes={"kernel": jnp.ones((D, 2))}), n),
        "classes/kernel has no tensor",
    ),
    "a parameter left out": (lambda p, n: ({k: v for k, v in p.items() if k != "norm"}, n), "lack norm/scale"),
    "no values": (
        lambda p, n: (renamed(p, head={"kernel": jax.ShapeDtypeStruct((D, V), "f4")}), n),
        "head/kernel has no values",
    ),
    "a quantised parameter": (
        lambda p, n: (jlora.quantize(p, jlora.trace(apply, p, IDS), {"head/kernel": "nf4"}), n),
        "head/kernel is quantised",
    ),
    "a map that lacks a parameter": (lambda p, n: (p, {"head/kernel": "lm_head"}), "no entry for these"),
    "a module that the checkpoint lacks": (
        lambda p, n: (p, by_hand("/{i}") | {"norm/scale": jlora.peft.Module("model.nrm.weight", "parameter")}),
        "model.nrm.weight",
    ),
    "an unrelated weight in a map by hand": (
        lambda p, n: (renamed(p, head={"kernel": -p["head"]["kernel"]}), by_hand("/{i}")),
        "layout of head/kernel",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path, case):
    change, pattern = CASES[case]
    refused(tmp_path, change, pattern)


def test_a_number_that_the_dtype_cannot_hold(tmp_path):
    def change(params, names):
        return renamed(params, norm={"scale": params["norm"]["scale"].astype(jnp.float32) * 1e6}), names

    refused(tmp_path, change, "norm/scale has the number .* float16", dtype=np.float16)


def test_parameters_that_share_a_tensor_must_agree(tmp_path):
    """The program has two copies of a weight that is one tensor in the checkpoint."""
    state = checkpoint(tmp_path / "base", tied=True)
    del state["lm_head.weight"]
    save_file(state, tmp_path / "one.safetensors")
    params = params_of(state, tied=True)
    params["head"] = {"kernel": params["embed"]["embedding"].T}
    names = jlora.peft.infer_names(params, tmp_path / "one.safetensors")
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].add(1)
    with pytest.raises(ValueError, match=r"shares the tensor model.embed.weight with"):
        jlora.hf.save_merged(tmp_path / "merged", params, names, like=tmp_path / "one.safetensors")
    params["embed"]["embedding"] = params["head"]["kernel"].T
    jlora.hf.save_merged(tmp_path / "merged", params, names, like=tmp_path / "one.safetensors")
    saved = load_file(tmp_path / "merged" / "one.safetensors")
    np.testing.assert_array_equal(saved["model.embed.weight"], params["embed"]["embedding"])


def test_it_never_overwrites(tmp_path):
    state = checkpoint(tmp_path / "base")
    params = params_of(state)
    names = jlora.peft.infer_names(params, tmp_path / "base")
    jlora.hf.save_merged(tmp_path / "merged", params, names, like=tmp_path / "base")
    with pytest.raises(FileExistsError, match="exists"):
        jlora.hf.save_merged(tmp_path / "merged", params, names, like=tmp_path / "base")


if all(importlib.util.find_spec(library) for library in ("torch", "transformers")):

    def test_live(tmp_path):
        """transformers computes with the merged MiniLM what the JAX program does, and the layout is the original's."""
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModel  # pyright: ignore[reportMissingImports]

        folder = assets.minilm()
        model, variables = minilm.load(folder)
        ids = np.random.default_rng(0).integers(1000, 20000, (2, 9), np.int32)
        mask = np.array([[1] * 9, [1] * 6 + [0] * 3], np.int32)
        sites = jlora.trace(model.apply, variables, ids, mask)
        adapter = jlora.init(jax.random.key(0), sites, {".*kernel": jlora.LoRA(4), ".*(bias|scale)": jlora.Full()})
        rng = np.random.default_rng(1)
        adapter = jax.tree.map(lambda a: jnp.asarray(0.03 * rng.normal(size=a.shape).astype(np.float32)), adapter)
        merged = jlora.merge(variables, adapter)
        jlora.hf.save_merged(tmp_path / "hf", merged, jlora.peft.infer_names(variables, folder), like=folder)

        def outputs(path: Path) -> np.ndarray:
            with torch.no_grad():
                torch_model = AutoModel.from_pretrained(path).eval()
                states = torch_model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
            return (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]

        ours, theirs = np.asarray(jax.jit(model.apply)(merged, ids, mask)), outputs(tmp_path / "hf")
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
        assert np.abs(theirs - outputs(folder)).max() > 0.1
        old, new = ((path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "hf"))
        header = 8 + int.from_bytes(old[:8], "little")
        assert len(old) == len(new)
        assert old[:header] == new[:header]
