"""Methods against loralib, PEFT and LyCORIS: the outputs, gradients and merged weights of `golden/methods.py`."""

from __future__ import annotations

import dataclasses
import importlib.util
import runpy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.references import CASES, GOLDEN, Array, Factors, golden, off

LIBRARIES = ("torch", "peft", "loralib", "lycoris")


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    """jlora's output, gradients and merged weight are those of the reference."""
    case, want = CASES[name], golden()[name]
    program, given = case.program, golden()[case.program.kind]
    ref = {key.removeprefix("factor."): array for key, array in want.items() if key.startswith("factor.")}
    params, x = {"w": jnp.asarray(given["weight"].transpose(program.order))}, jnp.asarray(given["x"])
    sites = jlora.trace(program.use, params, x)
    update = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, {"w": case.method}))["w"]

    def adapter(ref: Factors) -> dict[str, jlora.Update]:
        factors = case.factors(ref, params["w"])
        assert jax.tree.map(jnp.shape, factors) == jax.tree.map(jnp.shape, update.factors)
        return {"w": dataclasses.replace(update, factors=factors)}

    def loss(ref: Factors) -> tuple[Array, Array]:
        y = jlora.adapt(program.use, on_dense="allow")(params, adapter(ref), x)
        return jnp.sin(y).sum(), y

    @jax.jit
    def run(ref: Factors) -> dict[str, Array]:
        gradients, y = jax.grad(loss, has_aux=True)(ref)
        merged = jlora.merge(params, adapter(ref))["w"].transpose(np.argsort(program.order))
        return {"y": y, "merged": merged} | {f"gradient.{key}": array for key, array in gradients.items()}

    got = run(ref) | {f"factor.{key}": array for key, array in ref.items()}
    assert off(got, want) == {}


def test_file_and_table() -> None:
    """The file holds what the table asks for, and, where the libraries are at hand, what they compute."""
    assert set(golden()) == {*CASES, *(case.program.kind for case in CASES.values())}
    flat = {f"{part}/{name}": array for part, arrays in golden().items() for name, array in arrays.items()}
    if all(importlib.util.find_spec(library) for library in LIBRARIES):
        assert off(recomputed(), flat) == {}


def recomputed() -> dict[str, np.ndarray]:
    """The same by the script that made the file."""
    with warnings.catch_warnings():  # of the libraries about themselves
        warnings.simplefilter("ignore")
        return runpy.run_path(str(GOLDEN.with_suffix(".py")))["records"]()
