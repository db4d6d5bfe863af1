"""Where a weight is materialised: the line in warnings and in `explain`, and the verdict of `print(sites)`."""

import inspect
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jlora

W = jax.random.normal(jax.random.key(0), (16, 12))
X = jax.random.normal(jax.random.key(1), (4, 16))


def normalised(params, x):
    return x @ (params["w"] / jnp.linalg.norm(params["w"]))


def scanned(params, x):
    return jax.lax.scan(lambda carry, _: (normalised(params, x), None), normalised(params, x), None, length=2)[0]


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(12, use_bias=False))(x)


def layer(params, x):
    return Normalised().apply({"params": {"Dense_0": {"kernel": params["w"]}, "WeightNorm_0": SCALES}}, x)


SCALES = {"Dense_0/kernel/scale": jnp.ones(12)}
ADAPTER = jlora.init(jax.random.key(2), jlora.trace(lambda p, x: x @ p["w"], {"w": W}, X), jlora.LoRA(2))


@pytest.mark.parametrize(
    ("program", "function"),
    [
        (normalised, normalised),
        (jax.jit(normalised), normalised),
        (jax.checkpoint(normalised), normalised),
        (scanned, normalised),
        (layer, Normalised.__call__),
    ],
    ids=["bare", "jit", "checkpoint", "scan", "library_layer"],
)
def test_a_dense_use_is_reported_at_the_users_line(program, function):
    jnp.linalg.norm(W)  # the program of this function is traced here, at another line
    lines, start = inspect.getsourcelines(inspect.unwrap(function))
    line = start + next(k for k, text in enumerate(lines) if "norm(" in text.lower())
    place = f"{Path(__file__)}:{line} ({function.__qualname__})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jlora.adapt(program)({"w": W}, ADAPTER, X)
    (message,) = {str(w.message) for w in caught if issubclass(w.category, jlora.DenseWarning)}
    assert f"w: mul at {place}" in message
    dense = jlora.explain(program, {"w": W}, ADAPTER, X).dense
    assert {(use.primitive, use.where) for use in dense} == {("mul", place)}


def test_only_libraries_between_the_call_and_the_use():
    module = nn.WeightNorm(nn.Dense(12, use_bias=False))
    params = module.init(jax.random.key(0), X)
    path = "params/layer_instance/kernel"
    (use,) = jlora.explain(module.apply, params, {path: ADAPTER["w"]}, X).dense
    assert "normalization.py" in use.where
    assert "(_l2_normalize)" in use.where


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize(
    ("use", "verdict"),
    [
        (lambda x, w: x @ w, "yes"),
        (lambda x, w: x @ w + x @ (w + jnp.ones((16, 12))), "yes"),
        (custom, "yes, dense in custom_vjp_call"),
        (lambda x, w: x @ w + x @ jnp.sin(w), "yes, dense in sin"),
        (lambda x, w: x @ w + custom(x, w) + jnp.cos(w).sum(), "yes, dense in custom_vjp_call, cos"),
        (lambda x, w: x @ w + x @ w.astype(jnp.float8_e4m3fn).astype(w.dtype), "yes, dense in convert_element_type"),
        (lambda x, w: jax.lax.ragged_dot(x, w[None], jnp.array([2])), "yes, dense in ragged_dot_general"),
        (
            jlora.extend.treat_as(lambda x, w: x @ w * w[0, 0], lambda x, w: x @ w * w[0, 0]),
            "yes, dense in jlora_treat_as",
        ),
        (lambda x, w: x @ jnp.sin(w), "no: no product, convolution or lookup uses it (only sin)"),
    ],
)
def test_the_table_of_sites_states_what_adapt_materialises(use, verdict):
    def program(params, x):
        return use(x, params["w"])

    sites = jlora.trace(program, {"w": W}, X)
    (row,) = [line for line in str(sites).splitlines() if line.startswith("w ")]
    assert row.endswith("  " + verdict)
    dense = jlora.explain(program, {"w": W}, ADAPTER, X).dense
    assert {use.dense_in for use in sites["w"].uses if not use.factored} == {use.primitive for use in dense}
