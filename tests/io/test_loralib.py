"""Adapters of loralib: MergedLinear with some of its parts, and convolutions, computed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

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
