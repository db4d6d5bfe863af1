"""The forms of the latency table: merged LoRA is the base's program, and adapter layers are not."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _adapter_layers, _latency_models, latency
from benchmarks._latency_models import ADAPTERS, BASE, MERGED, UNMERGED, Model

HOULSBY = "Adapter-H, 16"


@pytest.fixture(autouse=True)
def promotion() -> Any:
    """Flax promotes ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def small(name: str) -> Model:
    return _latency_models.SMALL[name]()


def with_forms(model: Model, *names: str) -> Model:
    return dataclasses.replace(model, forms={name: model.forms[name] for name in names})


def first_output(out: Any, donated: bool) -> Any:
    """Embeddings of the encoder, the cache of the decoder."""
    return out[1] if donated else out


@pytest.mark.parametrize("name", ["encoder", pytest.param("decoder", marks=pytest.mark.nightly)])
def test_merged_is_the_program_of_the_base_and_adapter_layers_are_not(name: str) -> None:
    model = small(name)
    programs = latency.compile_cell(with_forms(model, BASE, MERGED, UNMERGED, HOULSBY), 2, 8)
    texts = {name: program.as_text() for name, program in programs.items()}
    assert texts[MERGED] == texts[BASE]
    assert texts[HOULSBY] != texts[BASE]
    assert latency.different_lines(programs, MERGED) == 0
    assert latency.different_lines(programs, HOULSBY) > 0
    assert latency.different_lines(programs, UNMERGED) > 0

    # The base's own executable, given the merged weights, computes what the adapted program does.
    merged = programs[BASE](*model.forms[MERGED].params, *model.inputs(2, 8))
    beside = programs[UNMERGED](*model.forms[UNMERGED].params, *model.inputs(2, 8))
    base = programs[BASE](*model.forms[BASE].params, *model.inputs(2, 8))
    merged, beside, base = (first_output(out, model.donated) for out in (merged, beside, base))
    for a, b, c in zip(*map(jax.tree.leaves, (merged, beside, base)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        assert np.abs(a - c).max() > 1e-4, "the adapter changes nothing"


@pytest.mark.parametrize(
    ("name", "width", "layers", "values"),
    [("encoder", 32, 2, 32), pytest.param("decoder", 24, 3, 8, marks=pytest.mark.nightly)],
)
def test_numbers_that_each_form_adds(name: str, width: int, layers: int, values: int) -> None:
    forms = small(name).forms
    assert forms[MERGED].added == forms[BASE].added == 0
    assert forms[UNMERGED].added == layers * 8 * (width + width + width + values)  # query and value, rank 8
    for form, (kind, size) in ADAPTERS.items():
        places = {"H": 2, "L": 1}[kind]
        assert forms[form].added == layers * places * (2 * width * size + size + width)


def test_bottlenecks_follow_the_last_products_of_both_sublayers() -> None:
    """Without hidden units that act, a bottleneck adds its last bias to that of the layer before it."""
    encoder = small("encoder")
    form, (base,) = encoder.forms[HOULSBY], encoder.forms[BASE].params
    constants = {path: jnp.full(32, 0.1 * number) for number, path in enumerate(form.params[1], start=1)}
    layers = {
        path: layer | {"up": jnp.zeros_like(layer["up"]), "up_bias": constants[path]}
        for path, layer in form.params[1].items()
    }
    shifted = jax.tree.map(lambda a: a, base)
    for path, constant in constants.items():
        number, sublayer, name = path.split("/")
        shifted["params"][number][sublayer][name]["bias"] += constant
    inputs = encoder.inputs(2, 8)
    got, expected = jax.jit(
        lambda: (form.function(base, layers, *inputs), encoder.forms[BASE].function(shifted, *inputs))
    )()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_a_bottleneck_is_its_formula() -> None:
    layer = _adapter_layers.new_layer(jax.random.key(0), 6, 3)
    layer |= {"down_bias": jnp.arange(3.0), "up_bias": jnp.arange(6.0)}
    y = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    hidden = y @ layer["down"] + np.arange(3.0)
    gelu = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(
        _adapter_layers.bottleneck(layer, jnp.asarray(y)), y + gelu @ layer["up"] + np.arange(6.0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.nightly
def test_bottlenecks_that_add_nothing_leave_the_decoder_as_it_is() -> None:
    decoder = small("decoder")

    (base,), form = decoder.forms[BASE].params, decoder.forms[HOULSBY]

    def with_up(factor: float) -> Any:
        """The parameters with the last kernel of each bottleneck multiplied."""

        def scaled(path: Any, leaf: jax.Array) -> jax.Array:
            return factor * leaf if "['layer']['up']" in jax.tree_util.keystr(path) else leaf

        return jax.tree.map_with_path(scaled, form.params[0])

    runs = [(form.function, with_up(0)), (decoder.forms[BASE].function, base), (form.function, with_up(1000))]
    got, expected, changed = (jax.jit(function)(params, *decoder.inputs(2, 8))[1] for function, params in runs)
    for a, b, c in zip(*map(jax.tree.leaves, (got, expected, changed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        assert np.abs(c - b).max() > 1e-4
