"""Starts from inputs that are complex, all equal, or zero."""

import jax
import jax.numpy as jnp
import pytest

import jlora

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"varied": jax.random.normal(KEYS[0], (12, 12)), "equal": jax.random.normal(KEYS[1], (12, 12))}
X = jax.random.normal(KEYS[2], (20, 12))
EQUAL = jnp.broadcast_to(jax.random.normal(jax.random.key(3), (12,)), (20, 12))


def model(params, x, condition):
    return x @ params["varied"] + condition @ params["equal"]


ADAPTER = jlora.init(KEYS[0], jlora.trace(model, PARAMS, X, EQUAL), jlora.LoRA(rank=4))


def test_equal_inputs_explain_nothing() -> None:
    """A condition that is the same for all rows: its covariance is rounding errors, and takes no ranks."""
    inputs = jlora.calibrate(model, ADAPTER)(PARAMS, X, EQUAL)
    started = jlora.eva(ADAPTER, inputs, rho=2)
    assert {path: update["a"].shape for path, update in started.items()} == {"varied": (12, 8)}


def test_corda_refuses_inputs_of_zeros() -> None:
    inputs = jlora.calibrate(model, ADAPTER)(PARAMS, X, 0 * EQUAL)
    with pytest.raises(ValueError, match="equal: all its inputs are zero"):
        jlora.corda(ADAPTER, inputs, PARAMS, mode="instruction")


def test_complex_inputs_are_refused() -> None:
    def spectrum(params, x, condition):
        y = jax.lax.dot(jnp.fft.fft(x), params["varied"], preferred_element_type=jnp.complex64)
        return jnp.abs(y) + condition @ params["equal"]

    with pytest.raises(ValueError, match="varied cannot be recorded: an input is complex"):
        jlora.calibrate(spectrum, ADAPTER)(PARAMS, X, EQUAL)


def test_lora_ga_refuses_a_gradient_of_zeros() -> None:
    """The loss does not depend on one of two square weights."""
    loss = lambda adapter: jnp.sum(jlora.adapt(model)(PARAMS, adapter, X, 0 * EQUAL) ** 2)  # noqa: E731
    with pytest.raises(ValueError, match="equal: its gradient is zero"):
        jlora.lora_ga(KEYS[1], ADAPTER, jax.jit(jax.grad(loss)), passes=2)
