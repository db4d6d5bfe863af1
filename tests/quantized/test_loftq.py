"""LoftQ: adapters that start as a part of the rounding error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.quantized import quantized, weight


def test_loftq_starts_near_the_weight() -> None:
    params, low = toy_model.params(), quantized("nf4")
    adapter = jlora.init(jax.random.key(0), toy_model.sites(), {"layers/up|mix/kernel": jlora.LoRA(2, alpha=5.0)})
    kernel = params["mix"]["kernel"]

    def gaps(steps: int) -> float:
        base, started = jlora.loftq(adapter, params, low, steps=steps)
        assert base["embed"] is low["embed"]
        assert jax.tree.structure(started) == jax.tree.structure(adapter)
        merged = jlora.merge(base, started)
        stacked = jnp.linalg.norm(merged["layers"]["up"] - params["layers"]["up"], axis=(1, 2))
        rounding = jnp.linalg.norm(jlora.dequantize(low["layers"]["up"]) - params["layers"]["up"], axis=(1, 2))
        assert (stacked < rounding).all()
        return float(jnp.linalg.norm(merged["mix"]["kernel"] - kernel))

    tail = np.linalg.svd(np.asarray(kernel - jlora.dequantize(low["mix"]["kernel"])), compute_uv=False)[2:]
    assert gaps(1) == pytest.approx(np.linalg.norm(tail), rel=1e-4)


def test_loftq_improves_with_every_step() -> None:
    params = {"w": jnp.asarray(weight(128, 128))}

    def model(p: dict, x: jax.Array) -> jax.Array:
        return x @ p["w"]

    sites = jlora.trace(model, params, jnp.ones((2, 128)))
    low = jlora.quantize(params, sites, {"w": "nf4"})
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(16))
    merged = [jlora.merge(*jlora.loftq(adapter, params, low, steps=steps))["w"] for steps in (1, 5)]
    once, often = (float(jnp.linalg.norm(w - params["w"])) for w in merged)
    assert often < 0.9 * once < 0.9 * float(jnp.linalg.norm(jlora.dequantize(low["w"]) - params["w"]))


def test_loftq_errors() -> None:
    params, low = toy_model.params(), quantized("nf4")
    adapter = toy_model.adapter()
    with pytest.raises(ValueError, match="takes at least one step"):
        jlora.loftq(adapter, params, low, steps=0)
    with pytest.raises(ValueError, match="is not quantised"):
        jlora.loftq(adapter, params, params)
    with pytest.raises(ValueError, match="LoftQ initialises LoRA"):
        jlora.loftq(toy_model.adapter(jlora.DoRA(2)), params, low)
