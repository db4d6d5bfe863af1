"""Names that are found from values: which tensors, parts, stacks and joins parameters are made of."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.io.torch.weight_location import Weight, locate_weights
from tests.support import peft_exports
from tests.support.llama_layouts import (
    AT,
    LAYOUTS,
    D,
    E,
    F,
    H,
    K,
    L,
    V,
    assert_rebuilt,
    fused_in_torch,
    llama,
    located,
    numbers,
    plain,
    stacked,
)
from tests.support.peft_files import FILES, content, golden, program
from tests.support.peft_models import MODELS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    state = llama()
    params = LAYOUTS[layout](state)
    assert_rebuilt(jlora.peft.infer_names(params, state), params, state)


@pytest.mark.parametrize("layout", ["plain", "stacked", "fused and stacked"])
def test_parts_of_tensors(layout):
    state = llama()
    params, fused = LAYOUTS[layout](state), fused_in_torch(state)
    names = jlora.peft.infer_names(params, fused)
    assert_rebuilt(names, params, fused)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32 after bfloat16"])
def test_casts(dtype):
    """Parameters that were rounded, and the same in float32 again."""
    state = llama()
    narrow = jnp.dtype(dtype.split()[-1])
    params = jax.tree.map(lambda a: a.astype(narrow), plain(state))
    if "after" in dtype:
        params = jax.tree.map(lambda a: a.astype(np.float32), params)
    names = jlora.peft.infer_names(params, state)
    assert names.complete
    assert dict(names) == dict(jlora.peft.infer_names(plain(state), state))
    for path, leaf in names.leaves.items():
        assert leaf[0].tensor in state, path


def test_a_narrow_checkpoint():
    state = {name: tensor.astype(jnp.bfloat16) for name, tensor in llama().items()}
    params = jax.tree.map(lambda a: a.astype(np.float32), plain(state))
    assert_rebuilt(jlora.peft.infer_names(params, state), params, state)


@pytest.mark.parametrize("model", MODELS)
def test_the_maps_that_people_wrote(model):
    """The same modules as in the maps of the tests and examples, and everything else rebuilt."""
    state = golden()["model"][MODELS[model].torch]
    params = MODELS[model].params(state)
    names = jlora.peft.infer_names(params, state)
    assert located(names, params) == located(MODELS[model].names, params)
    assert_rebuilt(names, params, state)
    assert len(names) <= len(MODELS[model].names)


def test_fused_modules_of_several_widths():
    state = llama()
    params = LAYOUTS["fused and stacked"](state)
    entry = jlora.peft.infer_names(params, state)["layers/attention/qkv/kernel"]
    assert [(module.name, module.size) for module in entry] == [
        (f"model.layers.{{i}}.self_attn.{name}_proj", size) for name, size in (("q", H * K), ("k", K), ("v", K))
    ]


def test_every_other_layer_in_a_stack():
    state = llama()
    names = jlora.peft.infer_names(LAYOUTS["alternating stacks"](state), state)
    assert names["layers/{i}/mlp/up/kernel"] == "model.layers.{i+2*j}.mlp.up_proj"


def test_experts():
    """A tensor for each expert, gate and up in one kernel, layers and experts stacked."""
    state = llama()
    kernels = []
    for i in range(L):
        rows = []
        for e in range(E):
            gate, up = (numbers(F, D, seed=100 + 10 * i + 3 * e + k) for k in range(2))
            state |= {f"{AT(i)}moe.experts.{e}.w1.weight": gate, f"{AT(i)}moe.experts.{e}.w3.weight": up}
            rows.append(np.concatenate([gate.T, up.T], 1))
        kernels.append(np.stack(rows))
    params = stacked(plain(state))
    params["layers"] |= {"experts": {"kernel": np.stack(kernels)}}
    names = jlora.peft.infer_names(params, state)
    assert_rebuilt(names, params, state)
    assert names["layers/experts/kernel"] == tuple(f"model.layers.{{i}}.moe.experts.{{j}}.w{k}" for k in (1, 3))


def test_files(tmp_path):
    """A file, a folder, shards with their index: the same map; a prefix and new names."""
    state = llama()
    params, expected = plain(state), dict(jlora.peft.infer_names(plain(state), state))
    save_file(state, tmp_path / "model.safetensors")
    assert dict(jlora.peft.infer_names(params, tmp_path / "model.safetensors")) == expected
    assert dict(jlora.peft.infer_names(params, tmp_path)) == expected
    (tmp_path / "shards").mkdir()
    names = sorted(state)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, some in shards.items():
        save_file({name: state[name] for name in some}, tmp_path / "shards" / file)
    index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
    (tmp_path / "shards" / "a.safetensors.index.json").write_text(json.dumps(index))
    assert dict(jlora.peft.infer_names(params, tmp_path / "shards")) == expected
    twice = state | {f"ema.{name}": tensor for name, tensor in state.items()}
    names = jlora.peft.infer_names(params, twice, prefix="ema.", rename={r"^ema\.": "", "^model": "base"})
    assert names["layers/{i}/mlp/up/kernel"] == "base.layers.{i}.mlp.up_proj"
    (tmp_path / "shards" / "a-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="a-00002"):
        jlora.peft.infer_names(params, tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors.*neither"):
        jlora.peft.infer_names(params, tmp_path / "empty")


def test_a_causal_language_model_without_a_head(tmp_path):
    """transformers saves no tied head; the configuration says that there is one."""
    state = llama()
    head = state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    params = plain(state | {"lm_head.weight": head})
    params.pop("head")
    assert jlora.peft.infer_names(params, tmp_path)["embed/embedding"].tied == "lm_head"


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "name", ["conv1d_part", "fused", "stack_norms", "untied", "tied", "stacked_experts", "convolution"]
)
def test_files_of_peft(name, tmp_path):
    """PEFT's files by the inferred map are, byte for byte, those that PEFT was tested with; and they load again."""
    model = peft_exports.EXPORTS[name].model
    params, sites, _ = program(model)
    tied = {"embed/embedding": "lm_head"} if model == "llama_tied" else None
    names = jlora.peft.infer_names(params, golden()["model"][MODELS[model].torch], tied=tied).check()
    adapter = peft_exports.adapter(name, sites)
    jlora.peft.save(tmp_path / "a", adapter, names, params=params)
    assert content(tmp_path / "a") == {file: golden()["export"][name][file].tobytes() for file in FILES}
    again = jlora.peft.load(tmp_path / "a", sites, names, params=params)
    jlora.peft.save(tmp_path / "b", again, names, params=params)
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_the_program_decides_the_kind():
    """The values of a square weight do not tell which axis is out; the program does, also for (out, in) kernels."""
    params = {"square": {"kernel": numbers(D, D)}, "table": {"weight": numbers(V, D)}}
    state = {
        "c_attn.weight": params["square"]["kernel"].T,
        "c_attn.bias": numbers(D),
        "tokens.weight": params["table"]["weight"],
    }
    names = jlora.peft.infer_names(params, state)

    def kinds(product: Any) -> dict[str, str]:
        sites = jlora.trace(lambda p, i: product(p["table"]["weight"][i], p["square"]["kernel"]), params, jnp.arange(3))
        weights = {path: Weight(site.shape, site.roles) for path, site in sites.items()}
        resolved = names.for_weights(weights, sites)
        return {path: at.module.kind for path, at in locate_weights(resolved, weights).items()}

    assert kinds(lambda x, w: x @ w) == {"square/kernel": "linear", "table/weight": "embedding"}
    assert kinds(lambda x, w: x @ w.T) == {"square/kernel": "conv1d", "table/weight": "embedding"}
