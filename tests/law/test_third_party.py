"""Unmodified layers of Flax Linen, Flax NNX and Equinox: every weight of a product is adapted and stays factored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.agreement import adapter_for, check_law, sides
from tests.support.third_party import CASES, STATEFUL, Case

SIZE = 0.4  # of the factors: large ones make deep blocks without a norm so steep that float32 itself is too coarse


@pytest.mark.drawn(3)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_every_weight_is_factored_and_the_law_holds(make: Callable[[], Case]) -> None:
    case = make()
    sites = jlora.trace(case.fun, case.params, *case.args, **case.kwargs)
    adapter = adapter_for(sites, case.targets, np.random.default_rng(2), size=SIZE)
    kernels = {path for path, site in sites.items() if path.endswith(("kernel", "weight")) and len(site.shape) > 1}
    assert kernels <= set(adapter) == case.paths
    assert jlora.explain(case.fun, case.params, adapter, *case.args, **case.kwargs).dense == ()
    check_law(case.fun, case.params, adapter, *case.args, on_dense="error", **case.kwargs)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("make", STATEFUL, ids=lambda make: make.__name__)
def test_state_that_a_program_changes_is_that_of_the_merged_program(make: Callable[[], Case]) -> None:
    """The statistics depend on the adapter, and leave the program changed: what is compared above is not trivial."""
    case = make()
    sites = jlora.trace(case.fun, case.params, *case.args, **case.kwargs)
    adapter = adapter_for(sites, case.targets, np.random.default_rng(2), size=SIZE)
    ((_, state), _), ((_, expected), _) = sides(case.fun, case.params, adapter, *case.args, **case.kwargs)
    _, base = case.fun(case.params, *case.args, **case.kwargs)
    for new, same, old in zip(*map(floats, (state, expected, base)), strict=True):
        np.testing.assert_allclose(new, same, rtol=2e-5, atol=2e-5)
        assert np.abs(new - old).max() > 1e-2


def floats(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
