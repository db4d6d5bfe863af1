"""The tables of the pages on methods agree with the methods and with the results of the benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks import features_peft
from tests.support.pages import ROOT

PAGE = (ROOT / "jlora" / "methods" / "formulas.md").read_text()
SIZE = 96  # the smallest weight that all methods of the table fit and in which rank 32 is low


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its head left out."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


ABILITIES = rows("What each method can do")
every_row = pytest.mark.parametrize("row", ABILITIES, ids=[row[0] for row in ABILITIES])


def method_of(row: list[str]) -> jlora.Method:
    return eval(f"jlora.{row[0]}", {"jlora": jlora})


def model(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"]


@functools.cache
def example(method: jlora.Method) -> tuple[dict, dict]:
    """Parameters, and an adapter of theirs whose factors are all non-zero."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    params = {"w": jnp.asarray(normal((SIZE, SIZE)) / np.float32(SIZE**0.5))}
    sites = jlora.trace(model, params, jnp.zeros((2, SIZE)))
    init = jax.jit(lambda params: jlora.init(jax.random.key(1), sites, {"w": method}, params=params))
    update = init(params)["w"]
    factors = {n: a + np.float32(0.1) * normal(a.shape) for n, a in update.factors.items()}
    return params, {"w": dataclasses.replace(update, factors=factors)}


def test_every_method_is_on_the_page():
    public = {
        name
        for name in dir(jlora)
        if inspect.isclass(value := getattr(jlora, name))
        and issubclass(value, jlora.Method)
        and value is not jlora.Method
    }
    not_of_matrices = {"ConvLoRA", "LoCon", "SharedLoRA"}
    assert {row[0] for row in rows("What each method learns")} == public
    assert {row[0].partition("(")[0] for row in ABILITIES} == public - not_of_matrices


def test_each_type_of_peft_has_a_row():
    listed = json.loads(features_peft.RESULT.read_text())
    assert len(listed["types"]) == len(set(listed["types"])) == 45
    assert set(features_peft.FEATURES) == set(listed["types"])
    assert f"peft=={listed['peft']}" in (ROOT / "pyproject.toml").read_text()
    assert f"PEFT {listed['peft']}" in (ROOT / "jlora" / "methods" / "scope.md").read_text()


def convolution(params: dict, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("row", rows("What each method learns"), ids=lambda row: row[0])
def test_axes_are_those_that_the_method_declares(row: list[str]):
    method: jlora.Method = getattr(jlora, row[0])()
    is_convolution = row[0] in ("LoCon", "ConvLoRA")
    program, shape, x_shape = (
        (convolution, (3, 3, 8, 8), (1, 5, 5, 8)) if is_convolution else (model, (192, 192), (2, 192))
    )
    params = jax.eval_shape(lambda: {"w": jnp.zeros(shape)})
    sites = jlora.trace(program, params, jax.ShapeDtypeStruct(x_shape, jnp.float32))
    key = jax.random.key(0)
    adapter = jax.eval_shape(lambda w: jlora.init(key, sites, {"w": method}, params={"w": w}), params["w"])
    shown = [f"{name} ({axes.replace('*stack', '').strip() or 1})" for name, axes in adapter["w"].declared.items()]
    assert row[2] == ", ".join(shown)


@pytest.mark.drawn(3)
@every_row
def test_unmerge_and_dropout(row: list[str]):
    method = method_of(row)
    params, adapter = example(method)
    assert row[2] == ("yes" if "dropout" in {field.name for field in dataclasses.fields(method)} else "no")
    merged = jax.jit(jlora.merge)(params, adapter)
    if row[1] == "no":
        with pytest.raises(ValueError, match="depends on the base"):
            jlora.unmerge(merged, adapter)
    else:
        assert np.allclose(jax.jit(jlora.unmerge)(merged, adapter)["w"], params["w"], atol=1e-4)


@pytest.mark.drawn(3)
@every_row
def test_form_in_peft(row: list[str], tmp_path: Path):
    params, adapter = example(method_of(row))
    try:
        changes = jlora.peft.save(tmp_path / "adapter", adapter, {"w": "w"}, params=params)
        form = "as LoRA" if any("became a LoRA" in change for change in changes) else "native"
    except ValueError as error:
        form = "beside LoRA" if "adapt a weight by LoRA too" in str(error) else "refused"
    assert row[3] == form
