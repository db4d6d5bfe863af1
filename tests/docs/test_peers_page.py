"""The table of what other libraries do: jlora's own column, and the programs behind the others'."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks import features
from benchmarks._peers import forms
from tests.support.programs import PROGRAMS
from tests.support.weight_uses import KINDS

LIBRARIES = features.libraries(features.results())


def test_jlora_is_correct_in_every_case():
    for section in features.SECTIONS:
        rows = LIBRARIES["jlora"][section]
        assert {name: row["outcome"] for name, row in rows.items() if row["outcome"] != "correct"} == {}


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_was_tried_on_the_whole_catalogue(library: str):
    assert set(LIBRARIES[library]["weights"]) == {kind.name for kind in KINDS}
    assert set(LIBRARIES[library]["programs"]) == {program.name for program in PROGRAMS[1:]}


def test_forms_written_with_layers_compute_what_the_kinds_compute():
    """Else a library would be blamed for another program."""
    values = {kind.name: kind.values(np.random.default_rng(0)) for kind in KINDS if kind.name in forms.FORMS}

    def call(name: str, spec: forms.Spec, w: jax.Array, *inputs: jax.Array, factors: object = None) -> jax.Array:
        return forms.plain(spec, w.transpose(spec.order) if spec.order else w, *inputs)

    def both(values: dict) -> dict:
        out = {}
        for kind in KINDS:
            if kind.name in values:
                params, x = values[kind.name]
                out[kind.name] = kind.use(params, x), forms.form_of(kind).run(call, params, {}, **x)
        return out

    with jax.numpy_rank_promotion("allow"):  # as the libraries have it
        results = jax.jit(both)(values)
    for name, (expected, got) in results.items():
        assert got.shape == expected.shape, name
        bound = 0.03 if name == "cast_down" else 1e-5
        np.testing.assert_allclose(np.asarray(got, float), np.asarray(expected, float), bound, bound, err_msg=name)
