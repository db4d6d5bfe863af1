"""That the tests' catalogue of methods, `tests/support/methods.py`, is complete: every test over methods reads it."""

import numpy as np

import jlora
import jlora.methods
from tests.support.methods import METHODS, fitting
from tests.support.weight_uses import KINDS

EXPORTED = {getattr(jlora, name) for name in dir(jlora.methods)}


def test_every_exported_method_is_in_the_catalogue():
    assert len(EXPORTED) > 20
    assert {type(method) for candidates in METHODS.values() for method in candidates} == EXPORTED


def test_every_exported_method_is_chosen_for_some_weight():
    """A candidate that fits no weight of the catalogue would be listed, but never tested."""
    chosen = set()
    for kind in KINDS:
        params, x = kind.values(np.random.default_rng(0))
        sites = jlora.trace(kind.use, params, x)
        chosen |= {type(fitting(name, sites[path])) for name in METHODS for path in kind.weights}
    assert chosen == EXPORTED
