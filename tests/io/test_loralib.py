"""Adapters of loralib: its own merged weights, and MergedLinear with some of its parts, computed in NumPy."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io.peft import Module
from tests.support import references

IN, PART, PARTS, RANK, ALPHA = 5, 4, 3, 2, 4.0
OUT = PART * PARTS
RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def in_out(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def out_in(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"].T


def in_parts_out(params: dict, x: jax.Array) -> jax.Array:
    return jnp.einsum("bi,ipo->bpo", x, params["w"])


PROGRAMS = {in_out: (IN, OUT), out_in: (OUT, IN), in_parts_out: (IN, PARTS, PART)}


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "enable", [(True, False, True), (False, False, True), (True, False, False), (True, True, True)]
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_merged_linear(program, enable):
    """Part k of the weight (out, in) gets the product of its own rows of lora_B and lora_A; a disabled part nothing."""
    count = sum(enable)
    state = {"attn.lora_A": draw(RANK * count, IN), "attn.lora_B": draw(PART * count, RANK)}
    delta, position = np.zeros((OUT, IN), np.float32), 0
    for part, enabled in enumerate(enable):
        if enabled:
            a, b = (array.reshape(count, -1, array.shape[1])[position] for array in state.values())
            delta[part * PART : (part + 1) * PART] = ALPHA / RANK * b @ a
            position += 1
    params = {"w": jnp.asarray(draw(*PROGRAMS[program]))}
    sites = jlora.trace(program, params, jnp.ones((3, IN)))
    adapter = jlora.loralib.load(state, sites, {"w": "attn"}, alpha=ALPHA, enable=enable)
    added = np.asarray(jlora.merge(params, adapter)["w"] - params["w"])
    expected = delta if program is out_in else delta.T.reshape(PROGRAMS[program])
    np.testing.assert_allclose(added, expected, rtol=0, atol=1e-5)
    x = jnp.asarray(draw(3, IN))
    actual = jlora.adapt(program)(params, adapter, x)
    np.testing.assert_allclose(actual, program(jlora.merge(params, adapter), x), rtol=0, atol=1e-5)


def test_merged_linear_needs_its_enabled_parts():
    params = {"w": jnp.asarray(draw(IN, OUT))}
    sites = jlora.trace(in_out, params, jnp.ones((3, IN)))
    state = {"attn.lora_A": draw(2 * RANK, IN), "attn.lora_B": draw(2 * PART, RANK)}
    for enable in (None, (True, True), (True, False, False)):
        with pytest.raises(ValueError, match=r"attn has lora_A \(4, 5\) .* do not fit w \(5, 12\)\. .*needs enable="):
            jlora.loralib.load(state, sites, {"w": "attn"}, alpha=ALPHA, enable=enable)


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


def test_the_file_that_torch_writes():
    """`golden/loralib.pt`: a linear layer, and one whose first and last third are adapted."""
    path = Path(__file__).parents[1] / "golden" / "loralib.pt"
    params = {"plain": jnp.zeros((4, 6)), "merged": jnp.zeros((4, 6))}
    sites = jlora.trace(lambda p, x: x @ p["plain"] + x @ p["merged"], params, jnp.ones((2, 4)))
    names, enable = {"plain": "0", "merged": "1"}, (True, False, True)
    merged = jlora.merge(params, jlora.loralib.load(path, sites, names, alpha=3, enable=enable))
    shapes = {"0.lora_A": (2, 4), "0.lora_B": (6, 2), "1.lora_A": (4, 4), "1.lora_B": (4, 2)}
    state = {
        name: 0.3 * np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape)
        for name, shape in shapes.items()
    }
    np.testing.assert_allclose(merged["plain"], 1.5 * (state["0.lora_B"] @ state["0.lora_A"]).T, rtol=1e-5, atol=1e-6)
    first, last = (state["1.lora_B"][2 * k : 2 * k + 2] @ state["1.lora_A"][2 * k : 2 * k + 2] for k in range(2))
    expected = 1.5 * np.concatenate([first, np.zeros((2, 4)), last]).T
    np.testing.assert_allclose(merged["merged"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(FileNotFoundError):
        jlora.loralib.load("no such file", sites, names)
