"""Every kind of torch module in both orientations of the weight here, square or not: squares hide transpositions.

What a file holds is computed in NumPy, with a letter for each axis: `i` in, `o` out, `h` and `w` of a kernel, `e` of
experts, `r` the rank.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io.peft import Module

PREFIX = "base_model.model."
SCALE = 2.0
Tensors = dict[str, np.ndarray]

OBLONG = {"i": 4, "o": 6, "h": 2, "w": 3, "e": 3, "r": 2}
SQUARE = {"i": 4, "o": 4, "h": 4, "w": 4, "e": 4, "r": 2}
SIZES = {"oblong": OBLONG, "square": SQUARE}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of torch module.

    Arguments:
        torch: the axes of torch's weight.
        layouts: the axes of the weight here.
    """

    torch: str
    layouts: tuple[str, ...]


KINDS = {
    "linear": Kind("oi", ("io", "oi")),
    "conv1d": Kind("io", ("io", "oi")),
    "conv": Kind("oihw", ("hwio", "oihw")),
    "embedding": Kind("io", ("io", "oi")),
    "parameter": Kind("eoi", ("eio", "eoi")),
}
LAYOUTS = [(kind, layout) for kind, entry in KINDS.items() for layout in entry.layouts]


def draw(letters: str, sizes: dict[str, int], seed: int) -> np.ndarray:
    shape = [sizes[c] for c in letters]
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def program(kind: str, layout: str, sizes: dict[str, int]) -> tuple[Any, jax.Array]:
    """A use of the weight in its layout, and an input."""
    if kind == "conv":
        numbers = ("NCHW", layout.upper(), "NCHW")
        x = jnp.ones((2, sizes["i"], 5, 5))
        return lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=numbers), x
    if kind == "embedding":
        return lambda p, x: jnp.take(p["w"], x, axis=layout.index("i")), jnp.array([0, 2])
    if kind == "parameter":
        return lambda p, x: jnp.einsum(f"ebi,{layout}->ebo", x, p["w"]), jnp.ones((sizes["e"], 2, sizes["i"]))
    return lambda p, x: jnp.einsum(f"bi,{layout}->bo", x, p["w"]), jnp.ones((2, sizes["i"]))


def traced(kind: str, layout: str, sizes: dict[str, int]) -> tuple[dict[str, np.ndarray], jlora.Sites]:
    params = {"w": draw(layout, sizes, 0)}
    fun, x = program(kind, layout, sizes)
    return params, jlora.trace(fun, params, x)


def names_of(kind: str) -> dict[str, Module]:
    return {"w": Module("m.experts.a" if kind == "parameter" else "m.a", kind)}  # pyright: ignore[reportArgumentType]


def low_rank(kind: str, sizes: dict[str, int]) -> Tensors:
    """The two tensors of a LoRA, as PEFT writes them."""
    if kind == "embedding":
        return {"m.a.lora_embedding_A": draw("ri", sizes, 1), "m.a.lora_embedding_B": draw("or", sizes, 2)}
    if kind == "parameter":
        a, b = draw("eri", sizes, 1), draw("ore", sizes, 2)
        return {
            "m.experts.lora_A.weight": a.reshape(-1, sizes["i"]),
            "m.experts.lora_B.weight": b.reshape(sizes["o"], -1),
        }
    if kind == "conv":
        return {"m.a.lora_A.weight": draw("rihw", sizes, 1), "m.a.lora_B.weight": draw("or", sizes, 2)[..., None, None]}
    return {"m.a.lora_A.weight": draw("ri", sizes, 1), "m.a.lora_B.weight": draw("or", sizes, 2)}


def added(kind: str, layout: str, tensors: Tensors, sizes: dict[str, int]) -> np.ndarray:
    """What a LoRA adds to the weight here."""
    a, b = tensors.values()
    if kind == "parameter":
        a, b = a.reshape(sizes["e"], -1, sizes["i"]), b.reshape(sizes["o"], -1, sizes["e"])
        return SCALE * np.einsum(f"eri,ore->{layout}", a, b)
    if kind == "conv":
        return SCALE * np.einsum(f"rihw,or->{layout}", a, b[..., 0, 0])
    return SCALE * np.einsum(f"ri,or->{layout}", a, b)


def write(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    folder.mkdir()
    save_file({PREFIX + name: array for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def lora_fields(kind: str) -> dict[str, Any]:
    targets = {"target_modules": [], "target_parameters": ["experts.a"]} if kind == "parameter" else {}
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"]} | targets


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


of_layouts = pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
of_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@of_sizes
@of_layouts
def test_lora_is_read_and_written(tmp_path: Path, kind: str, layout: str, sizes: dict[str, int]) -> None:
    params, sites = traced(kind, layout, sizes)
    tensors = low_rank(kind, sizes)
    fields = lora_fields(kind) | {"fan_in_fan_out": kind == "conv1d"}
    adapter = jlora.peft.load(write(tmp_path / "given", tensors, **fields), sites, names_of(kind))
    assert_close(jlora.merge(params, adapter)["w"] - params["w"], added(kind, layout, tensors, sizes))
    jlora.peft.save(tmp_path / "saved", adapter, names_of(kind))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert set(saved) == {PREFIX + name for name in tensors}
    for name, array in tensors.items():
        np.testing.assert_array_equal(saved[PREFIX + name], array)


@of_sizes
@pytest.mark.parametrize(("kind", "layout"), [pair for pair in LAYOUTS if pair[0] in ("linear", "conv")])
@pytest.mark.parametrize("method", ["LOHA", "LOKR", "IA3", "DORA"])
def test_other_methods_are_read_and_written(
    tmp_path: Path, method: str, kind: str, layout: str, sizes: dict[str, int]
) -> None:
    """The weight in torch's layout, as PEFT defines each method, and from there here."""
    sizes = sizes if kind == "conv" else {**sizes, "h": 1, "w": 1}
    entry = KINDS[kind]
    params, sites = traced(kind, layout, sizes)
    weight = np.einsum(f"{layout}->{entry.torch}", params["w"])
    window = entry.torch[2:]
    n_out, n_in = sizes["o"], weight[0].size
    fields: dict[str, Any] = {"peft_type": method, "target_modules": ["a"], "r": 2, "alpha": 4}
    if method == "LOHA":
        first, second = ((draw("or", sizes, k), draw("r", sizes, k + 9)[:, None] * np.ones(n_in)) for k in (1, 2))
        tensors = {"hada_w1_a": first[0], "hada_w1_b": first[1].astype(np.float32), "hada_w2_a": second[0]}
        tensors["hada_w2_b"] = np.random.default_rng(5).normal(size=(2, n_in)).astype(np.float32)
        product = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
        expected = weight + SCALE * product.reshape(weight.shape)
    elif method == "LOKR":
        rng = np.random.default_rng(3)
        small = rng.normal(size=(2, 2)).astype(np.float32)
        large = rng.normal(size=(n_out // 2, sizes["i"] // 2, *(sizes[c] for c in window))).astype(np.float32)
        tensors = {"lokr_w1": small, "lokr_w2": large}
        fields |= {"r": 9, "decompose_factor": 2, "alpha": 9}
        product = np.einsum(f"ac,bd{window}->abcd{window}", small, large)
        expected = weight + product.reshape(weight.shape)
    elif method == "IA3":
        vector = draw("i", sizes, 4)
        tensors = {"ia3_l": vector.reshape(1, -1, *([1] * len(window)))}
        fields = {"peft_type": "IA3", "target_modules": ["a"], "feedforward_modules": ["a"]}
        expected = weight * vector.reshape(1, -1, *([1] * len(window)))
    else:
        lora = {name.removeprefix("m.a."): array for name, array in low_rank(kind, sizes).items()}
        magnitude = np.abs(draw("o", sizes, 4)) + 1
        tensors = lora | {"lora_magnitude_vector": magnitude.reshape((1, -1, 1, 1) if window else (-1,))}
        fields = lora_fields(kind) | {"use_dora": True}
        new = weight + added(kind, entry.torch, low_rank(kind, sizes), sizes)
        norm = np.sqrt(np.square(new).reshape(n_out, -1).sum(1))
        expected = new * (magnitude / norm).reshape(-1, *([1] * (weight.ndim - 1)))
    tensors = {f"m.a.{name}": array for name, array in tensors.items()}
    folder = write(tmp_path / "given", tensors, **fields)
    adapter = jlora.peft.load(folder, sites, names_of(kind), params=params)
    assert_close(jlora.merge(params, adapter)["w"], np.einsum(f"{entry.torch}->{layout}", expected))
    jlora.peft.save(tmp_path / "saved", adapter, names_of(kind), params=params)
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert set(saved) == {PREFIX + name for name in tensors}
    for name, array in tensors.items():
        assert_close(saved[PREFIX + name], array)


@of_sizes
@pytest.mark.parametrize(("kind", "layout"), [pair for pair in LAYOUTS if pair[0] != "parameter"])
def test_a_weight_that_is_trained_in_full(tmp_path: Path, kind: str, layout: str, sizes: dict[str, int]) -> None:
    """Beside a LoRA, without which PEFT has no such file."""
    fun, x = program(kind, layout, sizes)
    params = {"w": draw(layout, sizes, 0), "v": draw("io", sizes, 7)}
    sites = jlora.trace(lambda p, x: (fun(p, x), jnp.ones((2, sizes["i"])) @ p["v"]), params, x)
    names = {**names_of(kind), "v": Module("m.b")}
    torch = draw(KINDS[kind].torch, sizes, 3)
    tensors = {
        "m.a.weight": torch,
        "m.b.lora_A.weight": draw("ri", sizes, 1),
        "m.b.lora_B.weight": draw("or", sizes, 2),
    }
    fields = lora_fields("linear") | {"target_modules": ["b"], "modules_to_save": ["a"]}
    for folder in (write(tmp_path / "given", tensors, **fields), tmp_path / "saved"):
        adapter = jlora.peft.load(folder, sites, names, params=params)
        assert_close(jlora.merge(params, adapter)["w"], np.einsum(f"{KINDS[kind].torch}->{layout}", torch))
        if not (tmp_path / "saved").exists():
            jlora.peft.save(tmp_path / "saved", adapter, names, params=params)
    if kind != "embedding":  # which is saved as trained rows
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert_close(saved[f"{PREFIX}m.a.weight"], torch)


@of_sizes
@pytest.mark.parametrize(("kind", "layout"), [pair for pair in LAYOUTS if pair[0] in ("linear", "embedding", "conv1d")])
def test_trained_tokens_are_rows_of_the_weight_in_torch(
    tmp_path: Path, kind: str, layout: str, sizes: dict[str, int]
) -> None:
    params, sites = traced(kind, layout, sizes)
    first, second = KINDS[kind].torch
    tokens, rows = [0, 3], draw(second, sizes, 5) * np.array([[1.0], [2.0]], np.float32)
    torch = np.einsum(f"{layout}->{first}{second}", params["w"]).copy()
    torch[tokens] = rows
    fields = lora_fields(kind) | {"target_modules": [], "trainable_token_indices": {"a": tokens}}
    folder = write(tmp_path / "given", {"m.a.token_adapter.trainable_tokens_delta": rows}, **fields)
    adapter = jlora.peft.load(folder, sites, names_of(kind), params=params)
    assert_close(jlora.merge(params, adapter)["w"], np.einsum(f"{first}{second}->{layout}", torch))


@of_sizes
@pytest.mark.parametrize(("kind", "layout"), [pair for pair in LAYOUTS if pair[0] in ("linear", "embedding", "conv")])
def test_loralib(kind: str, layout: str, sizes: dict[str, int]) -> None:
    sizes = {**sizes, "w": sizes["h"]}  # its kernels are square
    params, sites = traced(kind, layout, sizes)
    side = sizes["h"] if kind == "conv" else 1
    rng = np.random.default_rng(6)
    a, b = (
        rng.normal(size=n).astype(np.float32) for n in ((2 * side, sizes["i"] * side), (sizes["o"] * side, 2 * side))
    )
    torch = "oihw" if kind == "conv" else "oi"
    expected = SCALE * (b @ a).reshape([sizes[c] for c in torch])
    adapter = jlora.loralib.load({"m.a.lora_A": a, "m.a.lora_B": b}, sites, names_of(kind), alpha=4.0)
    assert_close(jlora.merge(params, adapter)["w"] - params["w"], np.einsum(f"{torch}->{layout}", expected))


@of_sizes
@pytest.mark.parametrize("layout", ["io", "oi"])
def test_parts_of_one_module(tmp_path: Path, layout: str, sizes: dict[str, int]) -> None:
    """Two weights here that one linear layer of torch concatenates along its out axis."""
    params = {name: draw(layout, sizes, seed) for seed, name in enumerate(("q", "v"))}
    fun = lambda p, x: [jnp.einsum(f"bi,{layout}->bo", x, p[name]) for name in ("q", "v")]  # noqa: E731
    sites = jlora.trace(fun, params, jnp.ones((2, sizes["i"])))
    names = {name: Module("m.a", part=part) for part, name in enumerate(("q", "v"))}
    wide = {**sizes, "o": 2 * sizes["o"]}
    tensors = low_rank("linear", wide)
    adapter = jlora.peft.load(write(tmp_path / "given", tensors, **lora_fields("linear")), sites, names)
    delta = added("linear", "oi", tensors, wide)
    merged = jlora.merge(params, adapter)
    for part, name in enumerate(("q", "v")):
        rows = delta[part * sizes["o"] : (part + 1) * sizes["o"]]
        assert_close(merged[name] - params[name], np.einsum(f"oi->{layout}", rows))
