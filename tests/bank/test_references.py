"""`jlora.combine` against PEFT: the changes that `golden/combine.py` recorded, of linear, embedding and convolution."""

from __future__ import annotations

import functools
import importlib.util
import runpy
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.combinations import CONFIGS, DENSITY, KINDS, ORDER, ROLES, RULES, drop_masks, key, shape
from tests.support.references import EMBEDDED, LORA, LORA_CONV, error

GOLDEN = Path(__file__).parents[1] / "golden" / "combine.npz"
BOUND = 1e-5
FACTORS = {"embedding": EMBEDDED, "conv": LORA_CONV}


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", RULES)
def test_reference(how: str, kind: str) -> None:
    zeros = jnp.zeros(shape(kind))
    adapters = {}
    for name, (rank, alpha, is_stabilised) in CONFIGS.items():
        prefix = f"{kind}/{name}/"
        ref = {k.removeprefix(prefix): jnp.asarray(a) for k, a in golden().items() if k.startswith(prefix)}
        factors = FACTORS.get(kind, LORA)(ref, zeros)
        method = jlora.LoRA(rank, alpha, is_stabilised)
        adapters[name] = {kind: jlora.Update(factors, method, ROLES[kind], shape(kind))}
    options: dict[str, Any] = {"density": DENSITY} if "density" in RULES[how][2] else {}
    options |= {"key": key()} if "dare" in how else {}
    options |= {} if how == "concat" else {"rank": 3}
    combined, _ = jlora.combine(adapters, RULES[how][1], how=how, **options)
    delta = jlora.merge({kind: zeros}, combined)[kind].transpose(np.argsort(ORDER[kind]))
    assert error(delta, golden()[f"{kind}/{how}"]) <= BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_does_not_change(kind: str) -> None:
    assert np.array_equal(drop_masks(kind), golden()[f"{kind}/dropped"])


if all(importlib.util.find_spec(library) for library in ("torch", "peft", "lycoris")):

    def test_live() -> None:
        """The file holds what PEFT computes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded = runpy.run_path(str(GOLDEN.with_suffix(".py")))["records"]()
        assert recorded.keys() == golden().keys()
        assert max(error(recorded[name], array) for name, array in golden().items()) <= BOUND
