"""LoKr on convolutions: no dense weight, the merged program's values and gradients, and less work than it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.support import toy_model

LAST, FIRST, TURNED = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "HWNC")


def program(layout: tuple[str, str, str], n_in: int, n_out: int, **options: Any) -> tuple[Any, dict, jax.Array]:
    """A convolution with a window of 3 x 2, its kernel and its input."""
    x_axes, w_axes, _ = layout
    shape = [{"I": n_in, "O": n_out, "H": 3, "W": 2}[c] for c in w_axes]
    x = [{"N": 2, "C": n_in, "H": 5, "W": 4}[c] for c in x_axes]
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": layout} | options
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    return lambda p, x: lax.conv_general_dilated(x, p["w"], **options), params, jnp.asarray(rng.normal(size=x), "f4")


@pytest.mark.parametrize(
    ("layout", "sizes", "method", "options"),
    [
        (LAST, (4, 6), jlora.LoKr(1), {}),
        (TURNED, (8, 12), jlora.LoKr(1, decompose_both=True, factor=4), {"window_strides": (2, 1)}),
        (FIRST, (12, 9), jlora.LoKr(None), {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 0))}),
        pytest.param(FIRST, (7, 16), jlora.LoKr(2), {"rhs_dilation": (1, 2)}, marks=pytest.mark.nightly),
        pytest.param(LAST, (16, 7), jlora.LoKr(2), {}, marks=pytest.mark.nightly),
    ],
    ids=["low rank", "both of low rank", "full", "prime input", "prime output"],
)
def test_the_law(layout: Any, sizes: tuple[int, int], method: jlora.Method, options: dict) -> None:
    conv, params, x = program(layout, *sizes, **options)
    adapter = toy_model.random_adapter(jlora.trace(conv, params, x), method)
    assert not jlora.explain(conv, params, adapter, x).dense

    def gradients(apply: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda adapter, x: jnp.sin(apply(adapter, x)).sum(), (0, 1)))(adapter, x)

    actual = gradients(lambda adapter, x: jlora.adapt(conv)(params, adapter, x))
    expected = gradients(lambda adapter, x: conv(jlora.merge(params, adapter), x))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), actual, expected
    )


def test_it_takes_fewer_flops_than_the_merged_program() -> None:
    conv, params, x = program(LAST, 64, 64)
    adapter = toy_model.random_adapter(jlora.trace(conv, params, x), jlora.LoKr(1))

    def flops(apply: Any) -> float:
        step = jax.jit(jax.grad(lambda adapter, x: apply(adapter, x).sum(), (0, 1)))
        costs = step.lower(adapter, x).compile().cost_analysis()
        assert isinstance(costs, dict)
        return costs["flops"]

    merged = flops(lambda adapter, x: conv(jlora.merge(params, adapter), x))
    assert flops(lambda adapter, x: jlora.adapt(conv)(params, adapter, x)) < 0.8 * merged
