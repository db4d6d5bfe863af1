"""An adapted module against the plain module with merged weights: outputs, and state to the bit."""

import jax
import numpy as np
import pytest
from flax import nnx

import jlora
from tests.support.nnx_models import CASES, case, same_state


def run(model, x):
    return model(x)


BY_DEFAULT = [("shared", "eager"), ("batch_norm", "jit"), ("decode_cache", "jit")]
PAIRS = [(name, how) for name in CASES for how in ("eager", "jit")]
NIGHTLY = [pytest.param(*pair, marks=pytest.mark.nightly) for pair in PAIRS if pair not in BY_DEFAULT]


@pytest.mark.parametrize(("name", "how"), [*BY_DEFAULT, *NIGHTLY])
def test_law(name, how):
    """Two calls: the second starts from the state that the first left."""
    each, call = case(name), nnx.jit(run) if how == "jit" else run
    model, before = each.adapted(), nnx.state(each.module)
    plain = jlora.nnx.merge(model)
    assert list(jlora.nnx.adapter(model)) == each.paths
    assert type(plain) is type(each.module)
    assert isinstance(model, type(plain))
    for _ in range(2):
        expected, actual = call(plain, each.x), call(model, each.x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)
        same_state(jlora.nnx.base(model), plain)
    unchanged = jax.tree.map(lambda a, b: a is b, nnx.state(each.module), before)
    assert all(jax.tree.leaves(unchanged))
