"""Names that are found from values: which tensors, parts, stacks and joins parameters are made of; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora.io.torch.weight_location import Weight, locate_weights
from jlora.quantized.nf4 import quantize
from tests.support.peft_files import golden
from tests.support.peft_models import MODELS

D, H, KV, K, F, L, E, V = 12, 3, 1, 4, 20, 4, 2, 30  # width, heads, heads of key and value, ..., experts, words
State = dict[str, np.ndarray]
AT = "model.layers.{}.".format


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def llama(*, constant_norms: bool = False, layers: int = L) -> State:
    """A checkpoint with the names of a Llama."""
    shapes = {"self_attn.q_proj": (H * K, D), "self_attn.k_proj": (KV * K, D), "self_attn.v_proj": (KV * K, D)}
    shapes |= {"self_attn.o_proj": (D, H * K), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    shapes |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    names = {f"{AT(i)}{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    state = {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(names.items())}
    if constant_norms:
        state |= {name: np.ones(D, np.float32) for name, tensor in state.items() if tensor.ndim == 1}
    return state


def layer(state: State, i: int) -> dict[str, Any]:
    def kernel(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{AT(i)}{name}.weight"].T.reshape(shape)}

    return {
        "attention": {
            "query": kernel("self_attn.q_proj", D, H, K),
            "key": kernel("self_attn.k_proj", D, KV, K),
            "value": kernel("self_attn.v_proj", D, KV, K),
            "out": kernel("self_attn.o_proj", H, K, D),
        },
        "mlp": {"gate": kernel("mlp.gate_proj", D, F), "up": kernel("mlp.up_proj", D, F)}
        | {"down": kernel("mlp.down_proj", F, D)},
        "input_norm": {"scale": state[f"{AT(i)}input_layernorm.weight"]},
        "other_norm": {"scale": state[f"{AT(i)}post_attention_layernorm.weight"]},
    }


def plain(state: State) -> dict[str, Any]:
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": [layer(state, i) for i in range(L)],
        "norm": {"scale": state["model.norm.weight"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }


def stacked(params: dict[str, Any], axis: int = 0) -> dict[str, Any]:
    return params | {
        "layers": jax.tree.map(lambda *layers: np.stack(layers, min(axis, layers[0].ndim)), *params["layers"])
    }


def with_layers(params: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return params | {"layers": [change(layer) for layer in params["layers"]]}


def fused_attention(layer: dict[str, Any]) -> dict[str, Any]:
    """Query, key and value in one kernel, of which the query is wider."""
    attention = dict(layer["attention"])
    kernels = [attention.pop(name)["kernel"].reshape(D, -1) for name in ("query", "key", "value")]
    return layer | {"attention": attention | {"qkv": {"kernel": np.concatenate(kernels, 1)}}}


def fused_mlp(layer: dict[str, Any]) -> dict[str, Any]:
    mlp = dict(layer["mlp"])
    both = np.stack([mlp.pop(name)["kernel"] for name in ("gate", "up")], 1)
    return layer | {"mlp": mlp | {"gate_up": {"kernel": both}}}


def interleaved_mlp(layer: dict[str, Any]) -> dict[str, Any]:
    """Columns of gate and up in turns."""
    fused = fused_mlp(layer)["mlp"]
    turns = fused["gate_up"]["kernel"].transpose(0, 2, 1).reshape(D, 2 * F)
    return layer | {"mlp": fused | {"gate_up": {"kernel": turns}}}


def rotary(layer: dict[str, Any]) -> dict[str, Any]:
    """The rows of each head's query regrouped: pairs in the place of halves."""
    kernel = layer["attention"]["query"]["kernel"].reshape(D, H, 2, K // 2).transpose(0, 1, 3, 2).reshape(D, H, K)
    return layer | {"attention": layer["attention"] | {"query": {"kernel": kernel}}}


def fused_in_torch(state: State) -> State:
    """The same model with query, key and value in one tensor, and gate and up in one."""
    state = dict(state)
    for i in range(L):
        for joined, names in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = joined.split(".")[0]
            parts = [state.pop(f"{AT(i)}{module}.{name}_proj.weight") for name in names]
            state[f"{AT(i)}{joined}.weight"] = np.concatenate(parts)
    return state


def assert_rebuilt(names: jlora.peft.InferredNames, params: Any, state: State) -> None:
    """Every parameter from the checkpoint and every tensor from the parameters, both exactly."""
    leaves = {
        jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(a) for k, a in jax.tree.leaves_with_path(params)
    }
    assert names.complete
    assert set(names.leaves) | set(names.constant) == set(leaves)
    for path in names.leaves:
        np.testing.assert_array_equal(names.parameter(path, state.__getitem__), leaves[path])
    for name in {*state} - {*names.unused}:
        rebuilt = names.tensor(name, np.zeros_like(state[name]), leaves.__getitem__)
        cast = state[name].astype(next(iter(leaves.values())).dtype)
        np.testing.assert_array_equal(rebuilt.astype(cast.dtype), cast)


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "plain": plain,
    "stacked": lambda s: stacked(plain(s)),
    "stacked on the second axis": lambda s: stacked(plain(s), 1),
    "fused attention": lambda s: with_layers(plain(s), fused_attention),
    "fused and stacked": lambda s: stacked(with_layers(plain(s), lambda p: fused_mlp(fused_attention(p)))),
    "columns in turns": lambda s: with_layers(plain(s), interleaved_mlp),
    "rotary": lambda s: with_layers(plain(s), rotary),
    "rotary and stacked": lambda s: stacked(with_layers(plain(s), rotary)),
    "transposed": lambda s: jax.tree.map(lambda a: np.ascontiguousarray(a.T), plain(s)),
    "padded": lambda s: plain(s) | {"embed": {"embedding": np.pad(s["model.embed_tokens.weight"], [(0, 2), (0, 0)])}},
    "alternating stacks": lambda s: (
        plain(s) | {"layers": [stacked({"layers": plain(s)["layers"][k::2]})["layers"] for k in (0, 1)]}
    ),
}


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


def located(names: Any, params: Any) -> dict[str, Any]:
    """What a map says of every parameter."""
    leaves = jax.tree.leaves_with_path(params)
    weights = {jax.tree_util.keystr(k, simple=True, separator="/"): Weight(a.shape, ()) for k, a in leaves}
    return {
        path: (at.modules, at.module.kind, at.module.part, at.sizes_joined)
        for path, at in locate_weights(names, weights).items()
    }


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: jax.tree.map(lambda a: a + a.std() * numbers(*a.shape), p), "another model: of .*, 0 have a tensor"),
        (
            lambda p: jax.tree.map(lambda a: a * 1.001 + 1e-4 * numbers(*a.shape), p),
            r"differs from .* of its norm: was it trained",
        ),
        (lambda p: jax.tree.map(lambda a: a / 8, p), r"it is 0.125 times model.*: undo the scaling"),
        (lambda p: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), p), "is abstract"),
        (lambda p: p | {"k": quantize(jnp.ones((64, 64)), 0)}, "k is quantised"),
        (lambda p: {"n": 3}, "nothing to compare: 0 floating-point parameters"),
    ],
)
def test_params_that_are_refused(change, message):
    state = llama()
    with pytest.raises(ValueError, match=message):
        jlora.peft.infer_names(change(plain(state)), state)


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


def test_parameters_without_a_tensor(tmp_path):
    """A new head is reported, and refused when an adapter uses it."""
    state = llama()
    params = plain(state) | {"classifier": {"kernel": numbers(D, 5)}}
    names = jlora.peft.infer_names(params, state)
    assert set(names.unmatched) == {"classifier/kernel"}
    adapter = jlora.init(
        jax.random.key(0),
        jlora.trace(lambda p, x: x @ p["classifier"]["kernel"], params, np.ones((2, D), np.float32)),
        jlora.LoRA(2),
    )
    with pytest.raises(
        ValueError, match=r"classifier/kernel has no tensor in the checkpoint.*names \| {'classifier/kernel'"
    ):
        jlora.peft.save(tmp_path / "a", adapter, names)
    assert jlora.peft.save(tmp_path / "a", adapter, names | {"classifier/kernel": "score"}) == ()


@pytest.mark.parametrize("layout", ["rotary", "padded", "columns in turns"])
def test_layouts_that_no_entry_describes(layout, tmp_path):
    state = llama()
    params = LAYOUTS[layout](state)
    names = jlora.peft.infer_names(params, state)
    assert names.complete
    assert len(names.inexpressible) in (1, L)
    path = next(iter(names.inexpressible))
    weight = params
    for key in path.split("/"):
        weight = weight[int(key) if key.isdigit() else key]
    x = np.ones((2, weight.shape[0]), np.float32)
    sites = jlora.trace(lambda p, x: jnp.tensordot(x, p[path], 1), {path: weight}, x)
    with pytest.raises(ValueError, match=f"{path} has no entry for PEFT"):
        jlora.peft.save(tmp_path / "a", jlora.init(jax.random.key(0), sites, jlora.LoRA(2)), names)
