"""EVA, CorDA and LoRA-GA against PEFT's, of a small model of linear layers that `golden/starts.py` recorded."""

from __future__ import annotations

import functools
import importlib.util
import runpy
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.data_starts import ALPHA, RANK, RHO, SIZES, draw, products_with
from tests.support.references import error

GOLDEN = Path(__file__).parents[1] / "golden" / "starts.npz"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["mix"]) @ params["down"]


PARAMS = {name: draw(name) for name in SIZES}


@functools.cache
def adapter() -> Any:
    sites = jlora.trace(model, PARAMS, draw("x"))
    return jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, jlora.LoRA(RANK, ALPHA)))


def inputs() -> dict[str, jlora.Inputs]:
    """The sums over the inputs of each layer, by NumPy."""
    x = draw("x")
    h = np.tanh(x @ PARAMS["up"])
    rows = {"up": x, "mix": h, "down": np.tanh(h @ PARAMS["mix"])}
    return {name: jlora.Inputs(a.T @ a, a.sum(0), np.float32(len(a))) for name, a in rows.items()}


def up_to_sign(ours: Any, theirs: np.ndarray) -> float:
    """The error of unit rows, whose signs are free."""
    rows = [np.asarray(a) / np.linalg.norm(a, axis=1, keepdims=True) for a in (ours, theirs)]
    signs = np.sign((rows[0] * rows[1]).sum(1, keepdims=True))
    return error(rows[0] * signs, rows[1])


def test_eva() -> None:
    """The ranks, the components, and the scale of the update."""
    started = jlora.eva(adapter(), inputs(), rho=RHO)
    ranks = {name: len(golden()[f"{name}/eva"]) for name in SIZES}
    assert {name: u.factors["a"].shape[1] for name, u in started.items()} == {n: r for n, r in ranks.items() if r}
    assert len(set(ranks.values())) > 1, "the ranks are redistributed"
    for name, update in started.items():
        assert up_to_sign(update.factors["a"].T, golden()[f"{name}/eva"]) < 1e-3
        assert update.method.scale == pytest.approx(ALPHA / RANK)
        assert not update.factors["b"].any()


@pytest.mark.parametrize(("mode", "name_in_peft"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda(mode: Any, name_in_peft: str) -> None:
    started = jlora.corda(adapter(), inputs(), PARAMS, mode=mode)
    for name, update in started.items():
        change = update.method.scale * update.factors["a"] @ update.factors["b"]
        assert error(change.T, golden()[f"{name}/{name_in_peft}"]) < 1e-3


def test_lora_ga() -> None:
    """The directions. PEFT has A unscaled and multiplies B by the singular values, which the paper does not."""

    def loss(params: Any) -> jax.Array:
        return jnp.mean((model(params, jnp.asarray(draw("x"))) - draw("y")) ** 2)

    started = jlora.lora_ga(jax.random.key(1), adapter(), products_with(jax.jit(jax.grad(loss))(PARAMS)))
    for name, update in started.items():
        a, b = (golden()[f"{name}/lora_ga_{side}"] for side in "AB")
        assert up_to_sign(update.factors["a"].T, a) < 1e-3
        assert up_to_sign(update.factors["b"], b.T) < 1e-3


if all(importlib.util.find_spec(library) for library in ("torch", "peft")):

    def test_live() -> None:
        """The file holds what PEFT computes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded = runpy.run_path(str(GOLDEN.with_suffix(".py")))["records"]()
        assert recorded.keys() == golden().keys()
        for name, array in golden().items():
            assert recorded[name].shape == array.shape
            if array.size:
                assert min(error(recorded[name], array), error(np.abs(recorded[name]), np.abs(array))) < 1e-3
