"""The form of a product: factored, summed with the base, or merged forward with a gradient of its own."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora._compat import bodies
from jlora.methods._common import random_matrices
from tests.support import toy_model

Tree = Any
MERGED = "merged forward, structured gradient"
N_IN, N_OUT, ROWS = 96, 64, 384
STRUCTURED = {
    "shira": jlora.SHiRA(4),
    "fourierft": jlora.FourierFT(40),
    "waveft": jlora.WaveFT(40),
    "c3a": jlora.C3A(16),
    "super_tuning": jlora.SuperTuning(0.9),
}


def model(p: Tree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"])


@functools.cache
def made(method: jlora.Method, rows: int = ROWS, dtype: Any = jnp.float32, n: int = N_IN) -> tuple[Tree, Tree, Any]:
    """Parameters, an adapter whose factors are not zero, and an input."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(n, N_OUT)) / n**0.5, dtype)}
    x = jnp.asarray(rng.normal(size=(rows, n)), dtype)
    (update,) = jlora.init(jax.random.key(0), jlora.trace(model, params, x), method, params=params).values()
    return params, {"w": dataclasses.replace(update, factors=toy_model.nonzero(update.factors))}, x


def form(method: jlora.Method, *args: Any) -> str:
    (use,) = jlora.explain(model, *made(method, *args)).uses
    assert use.why
    return use.form


def squares(tree: Tree) -> jax.Array:
    return sum((jnp.vdot(a, a) for a in jax.tree.leaves(tree)), jnp.zeros(()))


DERIVATIVES: dict[str, Callable[..., Callable[..., Any]]] = {
    "grad": lambda f: jax.grad(f, (0, 1)),
    "jvp": lambda f: lambda a, x: jax.jvp(f, (a, x), (jax.tree.map(jnp.cos, a), jnp.sin(x)))[1],
    "grad of grad": lambda f: jax.grad(lambda a, x: squares(jax.grad(f, (0, 1))(a, x)), (0, 1)),
    "vmap of grad": lambda f: lambda a, x: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(a, x.reshape(4, -1, x.shape[1])),
    "vmap over adapters": lambda f: (
        lambda a, x: jax.vmap(jax.grad(f), (0, None))(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), a), x)
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
}


@pytest.mark.parametrize(
    ("name", "derivative"),
    [
        pytest.param(n, d, marks=[] if (n, d) == ("shira", "grad of grad") else [pytest.mark.nightly])
        for n in STRUCTURED
        for d in DERIVATIVES
    ],
)
def test_derivatives_are_those_of_the_merged_weight(name: str, derivative: str) -> None:
    method = STRUCTURED[name]
    params, adapter, x = made(method)
    assert form(method) == MERGED
    adapted, merged = (
        jax.jit(DERIVATIVES[derivative](lambda a, x, f=f: f(a, x).sum()))(adapter, x)
        for f in (
            lambda a, x: jlora.adapt(model)(params, a, x),
            lambda a, x: model(jlora.merge(params, a), x),
        )
    )
    for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(merged), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["waveft", *(pytest.param(n, marks=pytest.mark.nightly) for n in STRUCTURED)])
def test_a_branch_has_the_value_of_the_merged_weight(name: str) -> None:
    """Of few rows, and in 16 bits, in which a sum would round the update."""
    method = STRUCTURED[name]
    rows = 1 if name != "c3a" else 384  # the sum with blocks of 16 costs less than three transforms
    assert form(method, 384, jnp.bfloat16) == "factored"
    assert form(dataclasses.replace(method, merge_in_16_bits=True), 384, jnp.bfloat16) == MERGED
    assert form(method, rows) == ("factored" if rows == 1 else MERGED)
    params, adapter, x = made(method, rows)
    y = jlora.adapt(model)(params, adapter, x)
    assert np.allclose(y, model(jlora.merge(params, adapter), x), atol=1e-5)


def with_held_places(dtype: Any) -> tuple[Tree, Tree, Tree, Any]:
    """Parameters, a SHiRA, the same with its places as an array, as one from a file of PEFT has it, and an input."""
    params, adapter, x = made(jlora.SHiRA(4), ROWS, dtype)
    held = {"w": adapter["w"].method.with_places(adapter["w"])}
    assert held["w"].method.seed is None
    return params, adapter, held, x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_places_that_an_update_holds_take_the_form_of_drawn_ones(dtype):
    """Merged forward in float32, beside the base in bfloat16."""
    params, adapter, held, x = with_held_places(dtype)
    drawn_use, held_use = (jlora.explain(model, params, a, x).uses[0] for a in (adapter, held))
    assert (held_use.form, held_use.why) == (drawn_use.form, drawn_use.why)
    assert (held_use.form == MERGED) == (dtype == jnp.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_places_that_an_update_holds_have_the_gradients_of_drawn_ones(dtype):
    params, adapter, held, x = with_held_places(dtype)
    gradients = [
        jax.grad(lambda a: squares(jlora.adapt(model)(params, a, x).astype(jnp.float32)))(a)["w"].factors["s"]
        for a in (adapter, held)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [jlora.C3A(16), jlora.SHiRA(4), jlora.RandLoRA(8)])
def test_a_small_update_of_sixteen_bits_is_kept(method: jlora.Method) -> None:
    """The sum that is asked for rounds it with the weight."""
    params, adapter, x = made(method, 384, jnp.bfloat16)
    small = jax.tree.map(lambda a: 0.01 * a, adapter)
    asked = dataclasses.replace(method, merge_in_16_bits=True)
    summed = {path: dataclasses.replace(update, method=asked) for path, update in small.items()}
    product = jlora.adapt(model)(params, summed, x)
    assert np.array_equal(product, model(jlora.merge(params, small), x))
    difference = jlora.adapt(model)(params, small, x).astype(jnp.float32) - model(params, x).astype(jnp.float32)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    expected = model(jlora.merge(wide, small), x.astype(jnp.float32)) - model(wide, x.astype(jnp.float32))
    rounded = model(jlora.merge(params, small), x).astype(jnp.float32) - model(params, x).astype(jnp.float32)
    error, error_of_rounded = (float(jnp.square(d - expected).mean()) for d in (difference, rounded))
    assert error < error_of_rounded


@pytest.mark.parametrize("name", ["shira", *(pytest.param(n, marks=pytest.mark.nightly) for n in list(STRUCTURED)[1:])])
def test_no_gradient_of_the_whole_weight_is_computed(name: str) -> None:
    def flops(method: jlora.Method) -> float:
        params, adapter, x = made(method, 1024, jnp.float32, 256)
        loss = lambda a, x, p: jlora.adapt(model)(p, a, x).sum()  # noqa: E731
        costs = jax.jit(jax.grad(loss, (0, 1))).lower(adapter, x, params).compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    whole, thin = (_cached(flops)(method) for method in (jlora.Full(), jlora.LoRA(1)))
    share = {"fourierft": 0.7, "c3a": 0.4}.get(name, 0.25)  # the transforms, whose share falls with the sizes
    assert flops(STRUCTURED[name]) < thin + share * (whole - thin)


_cached = functools.cache(lambda flops: functools.cache(flops))


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("name", ["shira", "super_tuning"])
def test_accelerators_have_no_loop_over_entries(name: str, rows: int) -> None:
    """A loop over chunks of entries takes many times longer there than a dense product."""
    params, adapter, x = made(STRUCTURED[name], rows)

    def gradients(run: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.grad(lambda a, x: jnp.square(run(a, x)).sum(), (0, 1))

    adapted = gradients(lambda a, x: jlora.adapt(model)(params, a, x))
    assert "scan[" in str(jax.make_jaxpr(adapted)(adapter, x))
    with jax.default_device("gpu"):  # only traced
        program = jax.make_jaxpr(adapted)(adapter, x)
    lengths = [int(length) for length in re.findall(r"length=(\d+)", str(program))]
    assert set(lengths) <= {1}
    values = jax.jit(jax.extend.core.jaxpr_as_fun(program))(*jax.tree.leaves((adapter, x)))
    merged = jax.jit(gradients(lambda a, x: model(jlora.merge(params, a), x)))(adapter, x)
    for a, b in zip(values, jax.tree.leaves(merged), strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def primitives_of_loops(jaxpr: Any, *, in_loop: bool = False) -> set[str]:
    """The names of the primitives in the bodies of scans."""
    names = {eqn.primitive.name for eqn in jaxpr.eqns} if in_loop else set()
    for eqn in jaxpr.eqns:
        for body, _ in bodies(eqn):
            names |= primitives_of_loops(body, in_loop=in_loop or eqn.primitive.name == "scan")
    return names


@pytest.mark.parametrize("name", ["shira", "super_tuning"])
def test_the_gradient_of_entries_is_a_product_on_the_cpu(name: str) -> None:
    """A sum over the rows of x takes three times as long there."""
    params, adapter, x = made(STRUCTURED[name])
    gradient = jax.grad(lambda a: jnp.square(jlora.adapt(model)(params, a, x)).sum())
    names = primitives_of_loops(jax.make_jaxpr(gradient)(adapter).jaxpr)
    assert "dot_general" in names
    assert "reduce_sum" not in names


def test_a_rank_as_high_as_the_weight_is_summed_if_that_costs_less() -> None:
    lora = jlora.LoRA(N_OUT)
    assert form(lora) == "dense sum"
    assert form(lora, 16) == "factored"  # 3 r (1/n + 1/m - 1/T) < 1
    assert form(lora, 384, jnp.bfloat16) == "factored"  # the sum would round the update
    assert form(jlora.LoRA(8)) == "factored"
    params, adapter, x = made(lora)
    assert np.allclose(jlora.adapt(model)(params, adapter, x), model(jlora.merge(params, adapter), x), atol=1e-5)
    assert not jlora.explain(model, params, adapter, x).dense


@pytest.mark.parametrize("at_once", [7, 2**20])
def test_random_matrices_are_uniform_numbers_of_a_key_for_each_row(at_once: int, monkeypatch: Any) -> None:
    """However many are drawn at once: adapters do not store them."""
    monkeypatch.setattr(random_matrices, "_DRAWN_AT_ONCE", at_once)
    key = random_matrices.keys(3, 1)[0]
    expected = [jax.random.uniform(jax.random.fold_in(key, k), (3,), minval=-1, maxval=1) for k in range(5)]
    assert np.array_equal(random_matrices.rows(key, 5, 3), np.stack(expected))


def test_c3a_has_the_values_of_peft() -> None:
    """Recorded with PEFT 0.21.2, times the in size."""
    expected = [[1, 2, 7, 8], [2, 1, 8, 7], [3, 4, 9, 10], [4, 3, 10, 9], [5, 6, 11, 12], [6, 5, 12, 11]]
    kernel = jnp.arange(1.0, 13).reshape(2, 3, 2)
    assert np.allclose(6 * delta(jlora.C3A(2), {"c": kernel}, (6, 4)), expected)


def test_waveft_has_the_values_of_peft() -> None:
    """Recorded with PEFT 0.21.2, which exchanges the differences along one axis with those along the other."""
    expected = [[3, 3, 4, -4], [-3, -3, -4, 4], [1, 1, 2, -2], [1, 1, 2, -2], [0, 0, 0, 0]]
    coefficients = jnp.zeros((5, 4)).at[[1, 1, 3, 3], [0, 3, 0, 3]].set(jnp.arange(1.0, 5))
    method = jlora.WaveFT(20, 2.0)  # a coefficient at every place
    assert np.allclose(delta(method, {"c": coefficients.reshape(-1)}, (5, 4)), expected, atol=1e-6)


def delta(method: jlora.Method, factors: Tree, shape: tuple[int, int]) -> jax.Array:
    """What an update adds to a weight."""
    params = {"w": jnp.zeros(shape)}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, shape[0])))
    update = jlora.init(jax.random.key(0), sites, method)["w"]
    return jlora.merge(params, {"w": dataclasses.replace(update, factors=factors)})["w"]


def test_another_use_of_a_structured_weight_gets_the_matrix() -> None:
    """A tied table is looked up, sliced, and multiplied along both of its axes."""

    def tied(p: Tree, ids: jax.Array) -> jax.Array:
        x = p["w"][ids] + p["w"][:3].sum() * p["w"].T[:, 2][None]
        return jnp.tanh(x @ p["w"].T) @ p["w"]

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(N_IN, 32)), jnp.float32)}
    ids = jnp.arange(256) % N_IN
    adapter = toy_model.random_adapter(jlora.trace(tied, params, ids), jlora.SHiRA(2))
    forms = {use.form for use in jlora.explain(tied, params, adapter, ids).uses if use.primitive == "dot_general"}
    assert forms == {MERGED, "dense sum"}
    y = jlora.adapt(tied, on_dense="allow")(params, adapter, ids)
    assert np.allclose(y, tied(jlora.merge(params, adapter), ids), rtol=1e-4, atol=1e-4)


def test_an_output_axis_that_another_program_has_in_common_with_the_activation() -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 3, 4)), jnp.bfloat16)}
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.bfloat16)
    sites = jlora.trace(lambda p, x: jnp.einsum("ti,iab->tab", x, p["w"]), params, x[0])
    adapter = toy_model.random_adapter(sites, jlora.C3A(4))

    def batched(p: Tree, x: jax.Array) -> jax.Array:
        return jnp.einsum("ati,iab->atb", x, p["w"])

    expected = batched(jlora.merge(params, adapter), x)
    np.testing.assert_array_equal(jlora.adapt(batched)(params, adapter, x), expected)
