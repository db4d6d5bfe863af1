"""Files of PEFT, and names, that are refused: the errors say which field, tensor or path is wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.peft_files import (
    FILES,
    NAMES,
    QUERY,
    change_configuration,
    change_tensors,
    golden,
    load_for_bert,
    program,
    unpack,
)
from tests.support.peft_models import MODELS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": ...}, r"lacks r, and jlora takes no default"),
        ({"lora_alpha": ...}, "lacks lora_alpha"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"peft_type": "ADALORA"}, "lacks init_r"),
        ({"peft_type": "ADALORA", "init_r": 3, "layer_replication": [[0, 2]]}, "layer_replication"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication = \[\[0, 2\]\]"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': PEFT changes the base.*start=folder"),
        ({"init_lora_weights": "corda"}, "'corda': PEFT changes the base.*start=folder"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga': PEFT changes the base.*start=folder"),
        ({"init_lora_weights": "loftq"}, "'loftq': PEFT changes the base.*Set it to true"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"r": "3"}, "rank of .* must be a positive integer; .* '3'"),
        ({"r": 2}, r"lora_A.weight has shape \(3, 16\), and 2 x 16 was expected"),
        ({"lora_alpha": None}, "alpha of .* must be a number; .* None"),
        ({"rank_pattern": ["query"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"target_modules": ["query", "key", "value", "dense"]}, "names these, and the file lacks.*self.key"),
        ({"target_modules": ["query", "dense"]}, "tensors for .*self.value.* does not name"),
        ({"modules_to_save": ["embeddings.LayerNorm"]}, "lacks them: .*embeddings.LayerNorm.bias"),
        ({"trainable_token_indices": [1]}, "lacks them: trained tokens"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
    ],
)
def test_a_configuration_that_is_refused(given_files, fields, message):
    change_configuration(given_files, **fields)
    with pytest.raises(ValueError, match=message):
        load_for_bert(given_files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{QUERY}.lora_B.weight"}, r"missing \['lora_B.weight'\]"),
        (
            lambda t: t.update({f"{QUERY}.lora_E": np.ones((3, 1), np.float32)}),
            r"query, LoRA of linear: missing \[\], left over \['lora_E'\]",
        ),
        (lambda t: t.update({"other.weight": np.ones(3, np.float32)}), "start with base_model.model."),
        (lambda t: t.update({f"{QUERY}.base_layer.bias": np.ones(16, np.float32)}), "does not name"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((3, 15), np.float32)}), r"\(3, 15\)"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((3, 16), np.int32)}), "dtype I32"),
        (
            lambda t: {key.replace("self.query", "self.quary"): value for key, value in t.items()},
            "encoder.layer.0.attention.self.quary: near misses: encoder.layer.0.attention.self.query",
        ),
    ],
)
def test_tensors_that_are_refused(given_files, change, message):
    change_tensors(given_files, change)
    with pytest.raises(ValueError, match=message):
        load_for_bert(given_files)


def test_a_grouped_convolution_and_random_matrices_of_torch(tmp_path):
    folder = unpack(golden()["adapter"]["cnn convolution"], tmp_path / "conv")
    change_tensors(folder, lambda t: t.update({"base_model.model.2.lora_A.weight": np.ones((3, 16, 2, 2), np.float32)}))
    params, sites, _ = program("cnn")
    with pytest.raises(ValueError, match="all channels of a grouped convolution"):
        jlora.peft.load(folder, sites, MODELS["cnn"].names, params=params)
    folder = unpack(golden()["adapter"]["bert vera"], tmp_path / "vera")
    change_tensors(folder, lambda t: {name: tensor for name, tensor in t.items() if name != "base_model.vera_A"})
    with pytest.raises(ValueError, match=r"lacks \['base_model.vera_A'\], the random matrices"):
        load_for_bert(folder)
    change_configuration(folder, save_projection=False)
    with pytest.raises(ValueError, match=r"has base_model.vera_B, and save_projection = False"):
        load_for_bert(folder)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_a_base_that_is_not_given(given_files, start):
    change_configuration(given_files, init_lora_weights=start)
    _, sites, _ = program("bert")
    with pytest.raises(ValueError, match=f"init_lora_weights = '{start}' changes the base.*Pass params="):
        jlora.peft.load(given_files, sites, NAMES)


def test_a_start_of_another_shape(given_files, tmp_path):
    """The adapter before training must have the modules and ranks of the trained one."""
    params, sites, _ = program("bert")
    start = unpack(golden()["adapter"]["bert lora"], tmp_path / "start")
    change_tensors(start, lambda t: t.update({f"{QUERY}.lora_A.weight": np.ones((2, 16), np.float32)}))
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \(2, 16\)"):
        jlora.peft.load(given_files, sites, NAMES, params=params, start=start)
    change_tensors(start, lambda t: {name: tensor for name, tensor in t.items() if QUERY not in name})
    with pytest.raises(ValueError, match=r"missing \['lora_A.weight', 'lora_B.weight'\]"):
        jlora.peft.load(given_files, sites, NAMES, params=params, start=start)


def test_a_bias_of_b_without_a_bias_of_the_module(tmp_path):
    """`lora_bias` of a module whose bias is not in the map, or of a file without it."""
    folder = unpack(golden()["adapter"]["bert output_bias"], tmp_path / "a")
    names = {path: module for path, module in NAMES.items() if not path.endswith("query/bias")}
    written = r"names\['layer_{i}/attention/query/bias'\] = Module\('encoder.layer.{i}.attention.self.query.bias'"
    with pytest.raises(ValueError, match=rf"changes the bias of .*self.query \(by lora_bias.*{written}"):
        load_for_bert(folder, names)
    change_configuration(folder, lora_bias=False)
    with pytest.raises(ValueError, match=r"has biases of B for .*lora_bias"):
        load_for_bert(folder)


def test_one_use_of_a_tied_weight(tmp_path):
    folder = unpack(golden()["adapter"]["llama with_base"], tmp_path / "a")
    params, sites, _ = program("llama_tied")
    with pytest.raises(ValueError, match="embedding and the output head at once"):
        jlora.peft.load(folder, sites, MODELS["llama_tied"].names, params=params)
    _, sites, _ = program("llama")
    with pytest.raises(ValueError, match="names tie embed/embedding to lm_head, and in the program"):
        jlora.peft.load(folder, sites, MODELS["llama_tied"].names, params=params)


def test_another_base(tmp_path):
    folder = unpack(golden()["adapter"]["llama with_base"], tmp_path / "a")
    params, sites, _ = program("llama")
    with pytest.raises(ValueError, match=r"base weight of model\.embed_tokens, and it is another"):
        jlora.peft.load(folder, sites, MODELS["llama"].names, params=jax.tree.map(lambda a: a + 1, params))
    with pytest.raises(ValueError, match="Pass params="):
        jlora.peft.load(folder, sites, MODELS["llama"].names)


def test_overlapping_patterns_follow_the_file(given_files):
    change_configuration(given_files, alpha_pattern={"layer.1.attention.self.query": 7, "query": 9})
    alphas = {path: vars(u.method)["alpha"] for path, u in load_for_bert(given_files).items() if "query" in path}
    assert alphas == {"layer_0/attention/query/kernel": 9, "layer_1/attention/query/kernel": 7}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({**NAMES, "layer_{i}/attention/query/kernel": "encoder.layer.{i}.attention.self.quary"}, "near misses"),
        ({**NAMES, "layer_{i}/attention/query/kernel": "encoder.layer.0"}, "has the index 'i'"),
        ({**NAMES, "layer_{i}/attention/query/kernel": "encoder.layer.{i}.{j}"}, "0 stack axes"),
        ({**NAMES, "layer_{i}/attention/key/kernel": "encoder.layer.{i}.output.dense"}, "both claim"),
        (
            {path.replace("query/kernel", "qeury/kernel"): m for path, m in NAMES.items()},
            r"(?s)self.query.*match no path: [^\n]*\blayer_\{i\}/attention/qeury/kernel",
        ),
    ],
)
def test_mistakes_in_names(given_files, names, message):
    with pytest.raises(ValueError, match=message):
        load_for_bert(given_files, names)


def test_names_under_a_prefix(given_files):
    params, _, _ = program("bert")
    sites = jlora.trace(
        lambda variables, ids: MODELS["bert"].apply(variables["params"], ids), {"params": params}, jnp.ones((1, 6), int)
    )
    loaded = jlora.peft.load(given_files, sites, jlora.peft.names.under("params/", NAMES))
    assert list(loaded) == [f"params/{path}" for path in load_for_bert(given_files)]


def test_two_ways_to_train_one_weight(given_files):
    change_configuration(given_files, trainable_token_indices={"query": [1]})
    key = f"{QUERY}.token_adapter.trainable_tokens_delta"
    change_tensors(given_files, lambda t: t.update({key: np.ones((1, 16), np.float32)}))
    with pytest.raises(ValueError, match="query in two ways"):
        load_for_bert(given_files)


def test_a_path_without_a_name(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)mix/kernel.*match no path: mix/kernle"):
        jlora.peft.save(
            tmp_path / "a", toy_model.adapter(), {"mix/kernle": "mix", "layers/up": "{i}", "layers/down": "{i}x"}
        )


def test_a_folder_that_exists_and_files_that_are_damaged(given_files):
    adapter = load_for_bert(given_files)
    with pytest.raises(FileExistsError, match="exists"):
        jlora.peft.save(given_files, adapter, NAMES)
    for name, bad in (("adapter_model.safetensors", b"\x10"), ("adapter_config.json", b"{")):
        good = (given_files / name).read_bytes()
        (given_files / name).write_bytes(bad)
        with pytest.raises(ValueError, match="cannot be read"):
            load_for_bert(given_files)
        (given_files / name).write_bytes(good)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        ("gpt2", {".*/up/kernel": jlora.LoHa(2)}, "LoHa of transformer.h.0.mlp.c_fc, conv1d, has no form"),
        ("bert", {".*/up/kernel": jlora.Hadamard(4, 2, "tanh")}, "the update of Hadamard has rank"),
        ("bert", {".*/up/(kernel|bias)": jlora.Full()}, "no file of trained weights alone"),
        (
            "bert",
            {".*/up/kernel": jlora.LoHa(2), ".*/up/bias": jlora.Full()},
            "no biases beside LOHA, and the adapter has",
        ),
        ("llama", {".*/up/kernel": jlora.LoRA(2), ".*/down/kernel": jlora.LoRA(2, dropout=0.5)}, "one dropout"),
        ("bert", {".*/query/kernel": jlora.IA3()}, "attention/query/kernel alone: .*attention/query/bias would change"),
    ],
)
def test_what_peft_cannot_hold(tmp_path, model, targets, message):
    params, sites, _ = program(model)
    adapter = toy_model.random_adapter(sites, targets)
    with pytest.raises(ValueError, match=message):
        jlora.peft.save(tmp_path / "a", adapter, MODELS[model].names, params=params)
    assert not list(tmp_path.iterdir())


def test_a_bias_without_a_name(tmp_path):
    """IA3 in PEFT scales a bias that the names do not know: neither way is it passed over."""
    names = {path: module for path, module in NAMES.items() if not path.endswith("bias")}
    params, sites, _ = program("bert")
    folder = unpack(golden()["adapter"]["bert ia3"], tmp_path / "a")
    adapter = jlora.init(jax.random.key(0), sites, {".*/query/kernel": jlora.IA3()})
    written = (
        r"names\['layer_{i}/attention/key/bias'\] = Module\('encoder.layer.{i}.attention.self.key.bias', 'parameter'\)"
    )
    with pytest.raises(ValueError, match=f"key/bias may be that of layer_0/attention/key/kernel.*{written}"):
        load_for_bert(folder, names)
    with pytest.raises(ValueError, match="query/bias may be that of"):
        jlora.peft.save(tmp_path / "b", adapter, names, params=params)
    adapter = jlora.init(jax.random.key(0), sites, {".*/query/kernel": jlora.LoRA(2), ".*/key/bias": jlora.Full()})
    with pytest.raises(ValueError, match=f"(?s)no module for these.*layer_0/attention/key/bias.*write {written}"):
        jlora.peft.save(tmp_path / "b", adapter, names, params=params)
    adapter = jlora.init(jax.random.key(0), sites, {".*/query/kernel": jlora.IA3()})
    with pytest.raises(ValueError, match="Pass params="):
        jlora.peft.save(tmp_path / "b", adapter, NAMES)
    with pytest.raises(ValueError, match="empty"):
        jlora.peft.save(tmp_path / "b", {}, NAMES)


@pytest.mark.parametrize("region", [*range(4), *(pytest.param(k, marks=pytest.mark.nightly) for k in range(4, 100))])
def test_damaged_files_raise_or_load(tmp_path, region):
    """Bytes that are changed, cut off or left out raise a ValueError, or give an adapter of the same structure."""
    files = golden()["adapter"]["bert patterns"]
    folder = unpack(files, tmp_path / "a")
    rng = np.random.default_rng(region)
    good = {name: files[name].tobytes() for name in FILES}
    for _ in range(25):
        name = FILES[int(rng.integers(2))]
        data, at = bytearray(good[name]), int(rng.integers(len(good[name])))
        match rng.integers(3):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data = data[:at]
            case _:
                del data[at : at + 1 + int(rng.integers(9))]
        (folder / name).write_bytes(bytes(data))
        try:
            loaded = load_for_bert(folder)
            assert all(isinstance(u, jlora.Update) for u in loaded.values())
        except ValueError:
            pass
        (folder / name).write_bytes(good[name])
