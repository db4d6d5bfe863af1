"""Errors of foreign files and of names, exact LoRAs of other methods, and loralib's adapters."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jlora
import names as maps
from jlora.io.peft import Module
from tests.support import methods, references, toy_model
from tests.support.peft_files import FILES, content, golden, program, unpack
from tests.support.peft_models import MODELS

NAMES = MODELS["bert"].names
QUERY = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.fixture
def given_files(tmp_path):
    """PEFT's LoRA for BERT in a folder."""
    return unpack(golden()["adapter"]["bert lora"], tmp_path / "given")


def configured(folder, **fields: Any) -> None:
    file = folder / FILES[0]
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def retensored(folder, change) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / FILES[1])
    save_file(change(tensors) or tensors, folder / FILES[1])


def load(folder, names=NAMES):
    params, sites, _ = program("bert")
    return jlora.peft.load(folder, sites, names, params=params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": ...}, r"lacks r, and jlora takes no default"),
        ({"lora_alpha": ...}, "lacks lora_alpha"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication = \[\[0, 2\]\]"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': PEFT changes the base"),
        ({"init_lora_weights": "olora"}, "PEFT changes the base"),
        ({"init_lora_weights": "loftq"}, "PEFT changes the base"),
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
    configured(given_files, **fields)
    with pytest.raises(ValueError, match=message):
        load(given_files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{QUERY}.lora_B.weight"}, r"missing \['lora_B.weight'\]"),
        (lambda t: t.update({f"{QUERY}.lora_E": np.ones((3, 1), np.float32)}), "query.lora_E"),
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
    retensored(given_files, change)
    with pytest.raises(ValueError, match=message):
        load(given_files)


def test_a_grouped_convolution_and_random_matrices_of_torch(tmp_path):
    folder = unpack(golden()["adapter"]["cnn convolution"], tmp_path / "conv")
    retensored(folder, lambda t: t.update({"base_model.model.2.lora_A.weight": np.ones((3, 16, 2, 2), np.float32)}))
    params, sites, _ = program("cnn")
    with pytest.raises(ValueError, match="all channels of a grouped convolution"):
        jlora.peft.load(folder, sites, MODELS["cnn"].names, params=params)
    folder = unpack(golden()["adapter"]["bert vera"], tmp_path / "vera")
    configured(folder, save_projection=False)
    with pytest.raises(ValueError, match=r"save_projection = False: .*torch's generator"):
        load(folder)


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
    configured(given_files, alpha_pattern={"layer.1.attention.self.query": 7, "query": 9})
    alphas = {path: vars(u.method)["alpha"] for path, u in load(given_files).items() if "query" in path}
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
            r"(?s)self.query.*match no path: layer_\{i\}/attention/qeury/kernel",
        ),
    ],
)
def test_mistakes_in_names(given_files, names, message):
    with pytest.raises(ValueError, match=message):
        load(given_files, names)


def test_names_under_a_prefix(given_files):
    params, _, _ = program("bert")
    sites = jlora.trace(
        lambda variables, ids: MODELS["bert"].apply(variables["params"], ids), {"params": params}, jnp.ones((1, 6), int)
    )
    loaded = jlora.peft.load(given_files, sites, maps.under("params/", NAMES))
    assert list(loaded) == [f"params/{path}" for path in load(given_files)]


def test_two_ways_to_train_one_weight(given_files):
    configured(given_files, trainable_token_indices={"query": [1]})
    key = f"{QUERY}.token_adapter.trainable_tokens_delta"
    retensored(given_files, lambda t: t.update({key: np.ones((1, 16), np.float32)}))
    with pytest.raises(ValueError, match="query in two ways"):
        load(given_files)


def test_a_path_without_a_name(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)mix/kernel.*match no path: mix/kernle"):
        jlora.peft.save(
            tmp_path / "a", toy_model.adapter(), {"mix/kernle": "mix", "layers/up": "{i}", "layers/down": "{i}x"}
        )


def test_a_folder_that_exists_and_files_that_are_damaged(given_files):
    adapter = load(given_files)
    with pytest.raises(FileExistsError, match="exists"):
        jlora.peft.save(given_files, adapter, NAMES)
    for name, bad in (("adapter_model.safetensors", b"\x10"), ("adapter_config.json", b"{")):
        good = (given_files / name).read_bytes()
        (given_files / name).write_bytes(bad)
        with pytest.raises(ValueError, match="cannot be read"):
            load(given_files)
        (given_files / name).write_bytes(good)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        ("gpt2", {".*/up/kernel": jlora.LoHa(2)}, "LoHa of transformer.h.0.mlp.c_fc, conv1d, has no form"),
        ("bert", {".*/up/kernel": jlora.Hadamard(4, 2, "tanh")}, "what Hadamard adds has rank"),
        ("bert", {".*/up/bias": jlora.Full()}, "no file of trained weights alone"),
        (
            "bert",
            {".*/up/kernel": jlora.LoHa(2), ".*/up/bias": jlora.Full()},
            "with LoRA alone, and the adapter has LOHA",
        ),
        ("llama", {".*/up/kernel": jlora.LoRA(2), ".*/down/kernel": jlora.LoRA(2, dropout=0.5)}, "one dropout"),
        ("bert", {".*/query/kernel": jlora.IA3()}, "attention/query/kernel alone: .*attention/query/bias would change"),
    ],
)
def test_what_peft_cannot_hold(tmp_path, model, targets, message):
    params, sites, _ = program(model)
    adapter = toy_model.nonzero(jlora.init(jax.random.key(0), sites, targets))
    with pytest.raises(ValueError, match=message):
        jlora.peft.save(tmp_path / "a", adapter, MODELS[model].names, params=params)
    assert not list(tmp_path.iterdir())


def test_a_bias_without_a_name(tmp_path):
    """IA3 in PEFT scales a bias that the names do not know: neither way is it passed over."""
    names = {path: module for path, module in NAMES.items() if not path.endswith("bias")}
    params, sites, _ = program("bert")
    folder = unpack(golden()["adapter"]["bert ia3"], tmp_path / "a")
    adapter = jlora.init(jax.random.key(0), sites, {".*/query/kernel": jlora.IA3()})
    with pytest.raises(ValueError, match="key/bias may be that of layer_0/attention/key/kernel"):
        load(folder, names)
    with pytest.raises(ValueError, match="query/bias may be that of"):
        jlora.peft.save(tmp_path / "b", adapter, names, params=params)
    with pytest.raises(ValueError, match="Pass params="):
        jlora.peft.save(tmp_path / "b", adapter, NAMES)
    with pytest.raises(ValueError, match="empty"):
        jlora.peft.save(tmp_path / "b", {}, NAMES)


@pytest.mark.parametrize(
    ("alphas", "dtype", "stored"),
    [
        ((3.0, 9.0), jnp.bfloat16, jnp.bfloat16),
        ((3.0, 5.0), jnp.bfloat16, jnp.float32),
        ((3.0, 5.0), jnp.float32, jnp.float32),
    ],
)
def test_a_stack_whose_layers_differ_in_rank(tmp_path, alphas, dtype, stored):
    """Layers of rank 2 and 3 become one LoRA of rank 3: the numbers are the same, and zeros stay zeros."""
    model, ranks = MODELS["llama"], (2, 3)
    _, sites, _ = program("llama")
    methods = [jlora.LoRA(rank, alpha) for rank, alpha in zip(ranks, alphas, strict=True)]
    targets = {f"layers/{k}/attention/query/kernel": method for k, method in enumerate(methods)}
    given = toy_model.nonzero(jlora.init(jax.random.key(0), sites, targets, dtype=dtype))
    jlora.peft.save(tmp_path / "a", given, model.names)

    scanned = MODELS["llama_scanned"]
    params, sites, run = program("llama_scanned")
    adapter = jlora.peft.load(tmp_path / "a", sites, scanned.names)
    (update,) = adapter.values()
    assert isinstance(update.method, jlora.LoRA)
    assert update.method.rank == max(ranks)
    unit = update.method.scale * update.scale
    assert (update["a"].dtype, update["b"].dtype) == (dtype, stored)
    for k, (path, one) in enumerate(given.items()):
        rank, ratio = ranks[k], np.float32(methods[k].scale / unit)
        assert path == f"layers/{k}/attention/query/kernel"
        assert np.array_equal(update["a"][k, :, :rank], one["a"])
        assert np.array_equal(update["b"][k, :rank].astype(np.float32), one["b"].astype(np.float32) * ratio)
        assert not update["a"][k, :, rank:].any()
        assert not update["b"][k, rank:].any()

    x = jnp.asarray(golden()["input"]["llama"]["x"])
    apply = jlora.adapt(scanned.apply)
    gradients = jax.jit(jax.grad(lambda adapter: jnp.sin(apply(params, adapter, x)).sum()))(adapter)
    (gradient,) = gradients.values()
    assert gradient["a"][0, :, :2].any()
    assert not gradient["a"][0, :, 2:].any()
    assert not gradient["b"][0, 2:].any()
    close(run(jlora.merge(params, adapter)), program("llama")[2](jlora.merge(program("llama")[0], given)))


def test_vllm(tmp_path):
    params, sites, _ = program("llama")
    names = MODELS["llama"].names
    targets = {".*/query/kernel": jlora.LoRA(2, 3.0), ".*/up/kernel": jlora.LoRA(4, 8.0)}
    adapter = toy_model.nonzero(jlora.init(jax.random.key(0), sites, targets))
    notes = jlora.peft.save(tmp_path / "a", adapter, names, target="vllm")
    assert len(notes) == 2
    assert "rank 2 padded to 4, B times 0.75" in notes[0]
    config = json.loads((tmp_path / "a" / FILES[0]).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})
    again = jlora.peft.load(tmp_path / "a", sites, names)
    close(jlora.merge(params, again), jlora.merge(params, adapter))
    for method in (jlora.DoRA(2), jlora.IA3("in")):
        other = toy_model.nonzero(jlora.init(jax.random.key(0), sites, {".*/up/kernel": method}))
        with pytest.raises(ValueError, match="no LoRA is smaller"):
            jlora.peft.save(tmp_path / "b", other, names, params=params, target="vllm")
    with_full = jlora.init(jax.random.key(0), sites, targets | {"norm/scale": jlora.Full()})
    with pytest.raises(ValueError, match="vLLM takes LoRA alone"):
        jlora.peft.save(tmp_path / "b", with_full, names, params=params, target="vllm")
    with pytest.raises(ValueError, match="target is one of"):
        jlora.peft.save(tmp_path / "b", adapter, names, target="tgi")
    assert not (tmp_path / "b").exists()


def close(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()), rtol=0)


def wide(p: dict, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda y, w: (y, x @ w), x, p["layers"])[1]


# Methods without a low rank, or with one that no factors of theirs show.
DENSE = {
    *("dora", "full", "hadamard_sigmoid", "hadamard_tanh", "hira", "ia3", "ia3_in", "oft", "boft", "randlora"),
    *("shira",),
}
BY_SVD = {"hra", "fourierft", "lokr", "lokr_both"}


def stacked_adapter(name):
    """Parameters of two layers, and an adapter of them by a method of the catalogue."""
    params = {"layers": jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 30)), jnp.float32)}
    sites = jlora.trace(wide, params, jnp.ones((3, 24)))
    method = methods.fitting(name, sites["layers"])
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, {"layers": method}, params=params))
    return params, toy_model.nonzero(shapes)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_a_dense_update_becomes_a_lora_only_if_a_rank_is_given(name):
    params, adapter = stacked_adapter(name)
    with pytest.raises(ValueError, match="so no LoRA is smaller"):
        jlora.to_lora(adapter, params)
    truncated, errors = jlora.to_lora(adapter, params, rank=3)
    assert vars(truncated["layers"].method)["rank"] == 3
    assert 0 < errors["layers"] < 1


@pytest.mark.parametrize("name", sorted(methods.METHODS.keys() - DENSE))
def test_a_low_rank_update_becomes_a_lora_that_adds_the_same(name):
    params, adapter = stacked_adapter(name)
    lora, errors = jlora.to_lora(adapter, params)
    assert {type(update.method) for update in lora.values()} == {jlora.LoRA}
    assert max(errors.values()) <= (1e-6 if name in BY_SVD else 0)
    close(jlora.merge(params, lora), jlora.merge(params, adapter))


def test_to_lora_keeps_lora_and_asks_for_the_base():
    adapter = toy_model.adapter()
    same, errors = jlora.to_lora(adapter)
    assert all(same[path] is update for path, update in adapter.items())
    assert set(errors.values()) == {0}
    with pytest.raises(ValueError, match="Pass params"):
        jlora.to_lora(toy_model.adapter(jlora.DoRA(2)))


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("loralib_linear", "linear", {}),
        ("loralib_merged_linear", "linear", {"enable": (True, False, True)}),
        ("loralib_embedding", "embedding", {}),
        ("loralib_conv2d", "conv", {}),
    ],
)
def test_loralib(name, kind, options):
    """The original library's tensors give its merged weights."""
    case, want = references.CASES[name], references.golden()[name]
    start = references.golden()[kind]
    params = {"w": jnp.asarray(start["weight"].transpose(case.program.order))}
    sites = jlora.trace(case.program.use, params, jnp.asarray(start["x"]))
    state = {f"a.layer.{x}": want[f"factor.{x}"] for x in ("lora_A", "lora_B")}
    names = {"w": Module("a.layer", kind)}
    adapter = jlora.loralib.load(state, sites, names, alpha=references.ALPHA, **options)
    merged = jlora.merge(params, adapter)["w"].transpose(np.argsort(case.program.order))
    assert references.error(merged, want["merged"]) <= references.BOUND
    for bad, message in (
        ({**state, "a.layer.weight": 1}, "no tensors of an adapter"),
        ({"a.layer.lora_A": state["a.layer.lora_A"]}, "no a.layer.lora_B"),
        ({key.replace("layer", "leyer"): value for key, value in state.items()}, "near misses: a.layer"),
        ({key: value[:, 1:] for key, value in state.items()}, "has lora_A"),
    ):
        with pytest.raises(ValueError, match=message):
            jlora.loralib.load(bad, sites, names, **options)


@st.composite
def weights(draw):
    """A program of one weight, stacked or not, with its heads apart or not; and its map."""
    n_in, heads, width, layers = (draw(st.integers(1, 5)) for _ in range(4))
    stacked, split, fused = (draw(st.booleans()) for _ in range(3))
    shape = (2 * n_in, 2 * heads, width) if split else (2 * n_in, 2 * heads * width)
    name: Any = "m.{i}.a" if stacked else "m.a"
    names = (name, f"{name}b") if fused else name
    return ((layers, *shape) if stacked else shape), {"w": names}, stacked


CASES = (
    weights(),
    st.sampled_from([jlora.LoRA, jlora.LoHa, jlora.LoKr, jlora.VeRA]),
    st.integers(1, 3),
    st.sampled_from([None, 1.0, 3.5]),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)


@settings(max_examples=6, deadline=None)
@given(*CASES)
def test_round_trips(tmp_path_factory, case, make, rank, alpha, dtype):
    """Random methods, shapes, dtypes and stackings: what is read is what was written, to the bit."""
    round_trip(tmp_path_factory.mktemp("a"), case, make, rank, alpha, dtype)


@pytest.mark.nightly
@settings(max_examples=150, deadline=None)
@given(*CASES)
def test_many_round_trips(tmp_path_factory, case, make, rank, alpha, dtype):
    round_trip(tmp_path_factory.mktemp("a"), case, make, rank, alpha, dtype)


def round_trip(folder, case, make, rank, alpha, dtype):
    shape, names, stacked = case
    if isinstance(names["w"], tuple) and make in (jlora.LoKr, jlora.VeRA):
        names = {"w": names["w"][0]}
    method = make(rank) if make is jlora.VeRA or alpha is None else make(rank, alpha)
    params = {"w": jnp.ones(shape)}

    def use(p: dict, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, p["w"], 1) if not stacked else jnp.einsum("lbi,li...->lb...", x, p["w"])
        return y

    x = jnp.ones((shape[0], 1, shape[1]) if stacked else (1, shape[0]))
    sites = jlora.trace(use, params, x)
    assume(not method.unsupported_reason(sites["w"]))
    adapter = toy_model.nonzero(jlora.init(jax.random.key(0), sites, {"w": method}, dtype=dtype))
    jlora.peft.save(folder / "one", adapter, names)
    again = jlora.peft.load(folder / "one", sites, names)
    jlora.peft.save(folder / "two", again, names)
    assert content(folder / "one") == content(folder / "two")
    if make is not jlora.VeRA or dtype == jnp.float32:
        for key, array in adapter["w"].factors.items():
            assert again["w"].factors[key].dtype == array.dtype
            assert np.array_equal(array, again["w"].factors[key])
    for path, update in jlora.to_lora(again)[0].items() if make is jlora.LoRA else ():
        close(jlora.merge(params, {path: update}), jlora.merge(params, adapter))


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
            loaded = load(folder)
            assert all(isinstance(u, jlora.Update) for u in loaded.values())
        except ValueError:
            pass
        (folder / name).write_bytes(good[name])
