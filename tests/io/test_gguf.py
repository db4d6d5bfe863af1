"""LoRA in GGUF files: read by the package gguf, and merged in NumPy by what the file says."""

from __future__ import annotations

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io.gguf import container
from jlora.kohya import Module
from tests.support.peft_files import program
from tests.support.peft_models import KV, MODELS, H

BOUND = 1e-5
TARGETS = {
    ".*/(query|key)/kernel": jlora.LoRA(2, 3.0),
    ".*/(out|down|value)/kernel": jlora.LoRA(3, 5.0),
    ".*/up/kernel": jlora.LoRA(2, 3.0, rank_stabilized=True),
    "embed/embedding": jlora.LoRA(3),
    "head/kernel": jlora.LoRA(3, 5.0),
}
# What llama.cpp calls the weights, by the names of Hugging Face.
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODULES = {f"model.layers.{i}.{hf}": f"blk.{i}.{cpp}" for i in range(2) for hf, cpp in PARTS.items()}
MODULES |= {"model.embed_tokens": "token_embd", "lm_head": "output"}
HEADS: dict[str, Any] = {"num_heads": H, "num_kv_heads": KV}


def drawn(sites: jlora.Sites, targets: Any, scale: float = 1.0) -> jlora.Adapter:
    """An adapter, all its numbers at random."""
    leaves, tree = jax.tree.flatten(jlora.init(jax.random.key(0), sites, targets))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jlora.scale(jax.tree.unflatten(tree, drawn), scale)


def change(reader: gguf.GGUFReader, module: str) -> np.ndarray | None:
    """What a file adds to llama.cpp's weight (out, in); None if nothing."""
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    if f"{module}.weight.lora_a" not in tensors:
        return None
    a, b = (np.asarray(tensors[f"{module}.weight.lora_{factor}"], np.float64) for factor in "ab")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    scale = alpha / b.shape[1]
    return scale * (b @ (a.T if module == "token_embd" else a))


def in_llama_cpp(weight: np.ndarray, module: str) -> np.ndarray:
    """A weight of Hugging Face (out, in) as llama.cpp has it: row 2 j + s of a head is row s * size / 2 + j."""
    heads = H if module.endswith("attn_q") else KV if module.endswith("attn_k") else 0
    if not heads:
        return weight
    size = len(weight) // heads
    order = [h * size + s * size // 2 + j for h in range(heads) for j in range(size // 2) for s in range(2)]
    return weight[order]


def hf_weights(params: Any, model: str) -> dict[str, np.ndarray]:
    """The weights (out, in) by the names of Hugging Face."""
    out = {"lm_head": np.asarray(params["head"]["kernel"]).T, "model.embed_tokens": params["embed"]["embedding"].T}
    for i in range(2):
        layer = jax.tree.map(lambda a, i=i: a[i], params["layers"]) if model == "llama_scanned" else params["layers"][i]
        for hf, name in zip(PARTS, ("query", "key", "value", "out", "gate", "up", "down"), strict=True):
            kernel = np.asarray(layer["attention" if "attn" in hf else "mlp"][name]["kernel"])
            n_in = 16 if name != "down" else kernel.shape[0]
            out[f"model.layers.{i}.{hf}"] = kernel.reshape(n_in, -1).T
    return {name: np.asarray(weight, np.float64) for name, weight in out.items()}


@pytest.mark.parametrize("model", ["llama", pytest.param("llama_scanned", marks=pytest.mark.nightly)])
def test_the_file_says_what_jlora_merges(tmp_path, model):
    params, sites, _ = program(model)
    names = MODELS[model].names
    adapter = drawn(sites, TARGETS, 0.5)
    notes = jlora.gguf.save(tmp_path / "a.gguf", adapter, names, "llama", **HEADS)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    texts = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert texts == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    before, after = hf_weights(params, model), hf_weights(jlora.merge(params, adapter), model)
    for name, module in MODULES.items():
        expected = in_llama_cpp(after[name] - before[name], module)
        actual = change(reader, module)
        np.testing.assert_allclose(np.zeros_like(expected) if actual is None else actual, expected, rtol=0, atol=BOUND)
    assert any("mlp.up_proj: B times" in note for note in notes)
    again = jlora.gguf.load(tmp_path / "a.gguf", sites, names, **HEADS)
    assert list(again) == list(adapter)
    for one, other in zip(*(jax.tree.leaves(jlora.merge(params, a)) for a in (adapter, again)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=BOUND)


def test_the_order_of_rows_is_that_of_the_rotation():
    """Rotating the halves of Hugging Face's rows is rotating the pairs of llama.cpp's."""
    rng, size = np.random.default_rng(0), 6
    query, angles = rng.normal(size=(H * size, 4)), rng.normal(size=size // 2)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    first, second = query.reshape(H, 2, size // 2, 4).swapaxes(0, 1)
    halves = np.concatenate([first * cos - second * sin, first * sin + second * cos], 1).reshape(H * size, 4)
    pairs = in_llama_cpp(query, "blk.0.attn_q").reshape(H, size // 2, 2, 4)
    rotated = np.stack([pairs[:, :, 0] * cos - pairs[:, :, 1] * sin, pairs[:, :, 0] * sin + pairs[:, :, 1] * cos], 2)
    np.testing.assert_allclose(in_llama_cpp(halves, "blk.0.attn_q"), rotated.reshape(H * size, 4), atol=1e-12)


# One linear layer, with llama.cpp's own name.
PARAMS = {"w": jnp.ones((4, 6))}
NAMES = {"w": "blk.0.ffn_up"}


@pytest.fixture
def sites() -> jlora.Sites:
    return jlora.trace(lambda p, x: x @ p["w"], PARAMS, jnp.ones((2, 4)))


def written(path: Any, kind: gguf.GGMLQuantizationType | None = None, alpha: float | None = 5.0, **fields: Any) -> Any:
    """A file that the package gguf writes, of rank 2, and what it adds to the kernel; `...` leaves a field out."""
    rng = np.random.default_rng(0)
    width = 4 if kind is None else 32
    a, b = rng.normal(size=(2, width)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | fields).items():
        if value is not ...:
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    data = a if kind is None else gguf.quantize(a, kind)
    writer.add_tensor("blk.0.ffn_up.weight.lora_a", data, raw_dtype=kind)
    writer.add_tensor("blk.0.ffn_up.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    a = a if kind is None else gguf.dequantize(data, kind)
    return (1.0 if not alpha else alpha / 2) * (b @ a).T


@pytest.mark.parametrize("alpha", [5.0, 0.0, None])
def test_a_file_of_the_package(tmp_path, sites, alpha):
    """Without alpha the scale is 1."""
    delta = written(tmp_path / "a.gguf", alpha=alpha)
    adapter = jlora.gguf.load(tmp_path / "a.gguf", sites, NAMES)
    np.testing.assert_allclose(jlora.merge(PARAMS, adapter)["w"], 1 + delta, rtol=1e-5, atol=1e-5)
    report = jlora.info(tmp_path / "a.gguf")
    (update,) = report.adapters[""].updates
    assert (report.format, update.path, update.rank, update.shape) == ("GGUF", "blk.0.ffn_up", 2, (6, 4))
    np.testing.assert_allclose(update.norm or 0, np.linalg.norm(delta), 1e-5)


def test_factors_of_8_bits(tmp_path):
    delta = written(tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q8_0)
    params = {"w": jnp.ones((32, 6))}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 32)))
    adapter = jlora.gguf.load(tmp_path / "a.gguf", sites, NAMES)
    np.testing.assert_allclose(jlora.merge(params, adapter)["w"], 1 + delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "names", "options", "message"),
    [
        ({"general.type": "model"}, NAMES, {}, r"\('model', 'lora'\); those of a LoRA"),
        ({"adapter.type": "control_vector"}, NAMES, {}, r"\('adapter', 'control_vector'\)"),
        ({"general.type": ...}, NAMES, {}, r"\(None, 'lora'\)"),
        ({"adapter.alora.invocation_tokens": "x"}, NAMES, {}, "alora.invocation_tokens"),
        ({}, {"w": "blk.1.ffn_up"}, {}, "blk.0.ffn_up: near misses: blk.1.ffn_up"),
        ({}, {"w": "model.layers.0.mlp.up"}, {}, "llama.cpp's qwen3 has no module for model.layers.0.mlp.up"),
    ],
)
def test_files_that_are_refused(tmp_path, sites, fields, names, options, message):
    written(tmp_path / "a.gguf", **fields)
    with pytest.raises(ValueError, match=message):
        jlora.gguf.load(tmp_path / "a.gguf", sites, names, **options)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.ffn_up.weight.lora_a": (2, 4)}, "blk.0.ffn_up: it has lora_a alone"),
        ({"blk.0.attn_norm.weight": (4,)}, "blk.0.attn_norm.weight: it is no factor of a LoRA"),
        ({"blk.0.ffn_up.weight.lora_a": (2, 5), "blk.0.ffn_up.weight.lora_b": (6, 2)}, r"\(2, 5\), and 2 x 4"),
        ({"blk.0.ffn_up.weight.lora_a": (3, 4), "blk.0.ffn_up.weight.lora_b": (6, 2)}, r"\(3, 4\), and 2 x 4"),
        ({"blk.0.ffn_up.weight.lora_a": (0, 4), "blk.0.ffn_up.weight.lora_b": (6, 0)}, "positive integer"),
        ({"blk.0.ffn_up.weight.lora_a": (3, 2, 4), "blk.0.ffn_up.weight.lora_b": (3, 6, 2)}, "no LoRA of experts"),
    ],
)
def test_tensors_that_are_refused(tmp_path, sites, tensors, message):
    fields = {"general.architecture": "qwen3", "general.type": "adapter", "adapter.type": "lora"}
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    (tmp_path / "a.gguf").write_bytes(container.pack(fields, arrays))
    with pytest.raises(ValueError, match=message):
        jlora.gguf.load(tmp_path / "a.gguf", sites, NAMES)
    assert jlora.info(tmp_path / "a.gguf").refused or message.startswith(r"\(2, 5\)")


@pytest.mark.parametrize(
    ("names", "target", "options", "message"),
    [
        (NAMES, jlora.DoRA(2), {}, "holds LoRA alone, and the adapter has .*DoRA"),
        (NAMES, jlora.Full(), {}, "holds LoRA alone, and the adapter has .*Full"),
        ({"w": Module("blk.0.x", "conv")}, jlora.LoRA(2), {}, "linear layers and embeddings"),
        (NAMES, jlora.LoRA(2), {"architecture": "granite"}, "does not know whether .* 'granite': pass"),
        ({"w": "blk.0.attn_q"}, jlora.LoRA(2), {"architecture": "llama"}, "rows of blk.0.attn_q in another order"),
        ({"w": "blk.0.attn_q"}, jlora.LoRA(2), {"architecture": "llama", "num_heads": 4}, "6 rows, which are not 4"),
        ({"w": "a.b"}, jlora.LoRA(2), {"architecture": "lama", "permute": False}, "has no architecture 'lama'"),
    ],
)
def test_what_cannot_be_saved(tmp_path, sites, names, target, options, message):
    adapter = jlora.init(jax.random.key(0), sites, target)
    architecture = options.get("architecture", "qwen3")
    rest = {key: value for key, value in options.items() if key != "architecture"}
    with pytest.raises(ValueError, match=message):
        jlora.gguf.save(tmp_path / "a.gguf", adapter, names, architecture, params=PARAMS, **rest)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_replaced(tmp_path, sites):
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(2))
    jlora.gguf.save(tmp_path / "a.gguf", adapter, NAMES, "qwen3")
    with pytest.raises(FileExistsError, match="exists"):
        jlora.gguf.save(tmp_path / "a.gguf", adapter, NAMES, "qwen3")
    for wrong, message in (({}, "empty"), (jlora.scale(adapter, 0), "scale 0")):
        with pytest.raises(ValueError, match=message):
            jlora.gguf.save(tmp_path / "b.gguf", wrong, NAMES, "qwen3")


def test_other_methods_become_lora(tmp_path, sites):
    adapter = drawn(sites, jlora.AdaLoRA(2, 3.0))
    (note,) = jlora.gguf.save(tmp_path / "a.gguf", adapter, NAMES, "qwen3")
    assert note == "w: AdaLoRA became a LoRA of rank 2, by its factors."
    merged = jlora.merge(PARAMS, jlora.gguf.load(tmp_path / "a.gguf", sites, NAMES))
    np.testing.assert_allclose(merged["w"], jlora.merge(PARAMS, adapter)["w"], rtol=1e-5)
