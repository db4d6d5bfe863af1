"""What methods draw: the same numbers under all settings of JAX, for weights that are not too large."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.agreement import adapter_for

DRAWING = [
    jlora.FourierFT(3, 1.0),
    jlora.RandLoRA(2),
    jlora.SHiRA(1),
    jlora.SHiRA(1, seed=-1),
    jlora.SHiRA(1, seed=2**33 + 5),
    jlora.UniLoRA(2, 7),
    jlora.VeRA(2),
    jlora.WaveFT(3, 1.0),
]


@contextlib.contextmanager
def seed_offset() -> Iterator[None]:
    jax.config.update("jax_random_seed_offset", 3)
    try:
        yield
    finally:
        jax.config.update("jax_random_seed_offset", 0)


SETTINGS = {
    "64 bits": lambda: jax.enable_x64(True),
    "threefry not partitionable": lambda: jax.threefry_partitionable(False),
    "offset of seeds": seed_offset,
    "another generator": lambda: jax.default_prng_impl("rbg"),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_an_adapter_is_the_same_under_other_settings(setting: Callable[[], Any]) -> None:
    shapes = {str(k): jax.ShapeDtypeStruct((4, 6), jnp.float32) for k in range(len(DRAWING))}
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    sites = jlora.trace(lambda p, x: [x @ w for w in p.values()], shapes, x)
    adapter = adapter_for(sites, {str(k): m for k, m in enumerate(DRAWING)}, np.random.default_rng(0))
    params = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    merged = jlora.merge(params, adapter)
    with setting():
        under_other_settings = jlora.merge(params, adapter)
    for path, expected in merged.items():
        np.testing.assert_allclose(under_other_settings[path], expected, atol=1e-6, err_msg=str(adapter[path].method))


@pytest.mark.parametrize(
    "method",
    [jlora.FourierFT(3), jlora.FRoD(0.2), jlora.SHiRA(1), jlora.SuperTuning(0.5), jlora.WaveFT(3, places="torch")],
    ids=str,
)
def test_entries_that_32_bits_cannot_number_are_refused(method: jlora.Method) -> None:
    side = 46_341  # the least whose square is above 2**31
    params = {"w": jax.ShapeDtypeStruct((side, side), jnp.bfloat16)}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jax.ShapeDtypeStruct((2, side), jnp.bfloat16))
    with pytest.raises(ValueError, match="46341 x 46341 entries are more than integers of 32 bits can number"):
        jax.eval_shape(lambda params: jlora.init(jax.random.key(0), sites, method, params=params), params)
