"""Calls of an adapted function outside of `jit`: parts under `jit` compile once, and nothing in them goes stale."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora


def new_params(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(keys[0], (5, 6)), "v": jax.random.normal(keys[1], (6, 4))}


PARAMS = new_params()
X = jax.random.normal(jax.random.key(2), (3, 5))


def model(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


LORA = jlora.LoRA(2)


def adapter_of(fun, method=LORA, params=PARAMS, x=X):
    adapter = jlora.init(jax.random.key(0), jlora.trace(fun, params, x), dict.fromkeys(params, method))
    return jax.tree.map(lambda a: a + 0.1, adapter)


@pytest.fixture
def compiled():
    """The names of the programs that are compiled from here on."""
    names = []

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield names
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.parametrize("method", [LORA, jlora.DoRA(2), jlora.Full()], ids=repr)
def test_later_calls_compile_nothing(compiled, method):
    g, adapter = jlora.adapt(jax.jit(model), on_dense="allow"), adapter_of(model, method)
    expected = model(jlora.merge(PARAMS, adapter), X)
    gradient = jax.grad(lambda adapter: g(PARAMS, adapter, X).sum())
    np.testing.assert_allclose(g(PARAMS, adapter, X), expected, rtol=2e-5, atol=2e-5)
    first = gradient(adapter)
    assert compiled
    others = jax.tree.map(lambda a: a + 1, (PARAMS, adapter, X))
    compiled.clear()
    for _ in range(2):
        g(*others)
        gradient(others[1])
    assert compiled == []
    jax.tree.map(np.testing.assert_array_equal, gradient(adapter), first)


def test_a_function_that_is_adapted_anew_for_each_call_compiles_once(compiled):
    f, adapter = jax.jit(model), adapter_of(model)
    jlora.adapt(f)(PARAMS, adapter, X)
    compiled.clear()
    jlora.adapt(f)(PARAMS, adapter, X)
    assert compiled == []


def test_functions_of_jax_numpy_compile_once(compiled):
    """Many are under `jit` themselves."""

    def f(p, rows):
        return jnp.take(p["w"], rows, axis=0) @ p["v"]

    rows = jnp.arange(3)
    g, adapter = jlora.adapt(f), adapter_of(f, x=rows)
    g(PARAMS, adapter, rows)
    compiled.clear()
    g(PARAMS, adapter, rows)
    assert compiled == []


def test_other_arguments_get_programs_of_their_own():
    g, adapter = jlora.adapt(jax.jit(model)), adapter_of(model)
    for dtype in (jnp.float32, jnp.bfloat16):
        for rows in (3, 2):
            x = X[:rows].astype(dtype)
            params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), PARAMS)
            value = g(params, adapter, x)
            assert value.dtype == dtype
            tolerance = 2e-5 if dtype == jnp.float32 else 0.1
            expected = np.asarray(model(jlora.merge(params, adapter), x), np.float32)
            np.testing.assert_allclose(np.asarray(value, np.float32), expected, rtol=tolerance, atol=tolerance)
    for other in (adapter_of(model, jlora.LoRA(3)), jlora.scale(adapter, 2.0), {"w": adapter["w"]}, {}):
        expected = model(jlora.merge(PARAMS, other), X)
        np.testing.assert_allclose(g(PARAMS, other, X), expected, rtol=2e-5, atol=2e-5)


def test_static_arguments_and_keywords():
    def f(p, x, times, *, sign=1):
        for _ in range(times):
            x = jnp.tanh(x @ p["w"]) @ p["u"]
        return sign * x

    params = PARAMS | {"u": PARAMS["w"].T}
    jitted = jax.jit(f, static_argnums=2, static_argnames="sign")
    g, adapter = jlora.adapt(jitted), adapter_of(lambda p, x: f(p, x, 1), params={k: params[k] for k in ("w", "u")})
    for times, sign in ((1, 1), (2, 1), (2, -1), (1, 1)):
        expected = f(jlora.merge(params, adapter), X, times, sign=sign)
        np.testing.assert_allclose(g(params, adapter, X, times, sign=sign), expected, rtol=2e-5, atol=2e-5)


def test_what_a_function_closes_over_is_as_fresh_as_in_jax():
    """A plain function is traced in every call. One under `jit` keeps what it was traced with, adapted or not."""
    factor = [1.0]

    def plain(p, x):
        return factor[0] * model(p, x)

    jitted, adapter = jax.jit(plain), adapter_of(model)
    merged = jlora.merge(PARAMS, adapter)
    for now in (1.0, 3.0):
        factor[0] = now
        for f in (plain, jitted):
            np.testing.assert_allclose(jlora.adapt(f)(PARAMS, adapter, X), f(merged, X), rtol=2e-5, atol=2e-5)


def test_a_setting_that_jax_traces_again_for():
    g, adapter = jlora.adapt(jax.jit(model)), adapter_of(model)

    def products(precision):
        with jax.default_matmul_precision(precision):
            jaxpr = str(jax.make_jaxpr(g)(PARAMS, adapter, X))
            np.testing.assert_allclose(g(PARAMS, adapter, X), model(jlora.merge(PARAMS, adapter), X), rtol=0.1)
        return jaxpr.count("HIGHEST")

    assert products("highest") > products("default") == 0


def test_every_call_warns_or_raises():
    f = jax.jit(lambda p, x: x @ jnp.exp(p["w"]))
    adapter = {"w": adapter_of(model)["w"]}
    for _ in range(2):
        with pytest.warns(jlora.DenseWarning, match="w: exp"):
            jlora.adapt(f)(PARAMS, adapter, X)
        with pytest.raises(jlora.DenseError, match="w: exp"):
            jlora.adapt(f, on_dense="error")(PARAMS, adapter, X)
        jlora.adapt(f, on_dense="allow")(PARAMS, adapter, X)


def test_masks_of_dropout_are_those_of_the_compiled_function():
    """Two uses of one weight draw two masks, in the first call and in later ones."""
    block = jax.jit(lambda p, x: x @ p["w"])

    def f(p, x):
        return block(p, x), block(p, x), (x @ p["w"])

    adapter = adapter_of(lambda p, x: x @ p["w"], jlora.LoRA(2, dropout=0.5), {"w": PARAMS["w"]})
    adapter = jlora.with_dropout(adapter, jax.random.key(3))
    g = jlora.adapt(f)
    first, second, third = expected = jax.jit(g)(PARAMS, adapter, X)
    assert not np.allclose(first, second)
    assert not np.allclose(second, third)
    for _ in range(2):
        for value, reference in zip(g(PARAMS, adapter, X), expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=2e-5, atol=2e-5)


def test_neither_arrays_nor_functions_are_kept():
    def call():
        """Returns references to all that goes in, and to what the function closes over."""
        constant = jax.random.normal(jax.random.key(5), (6, 4))
        params = new_params(7)
        f = jax.jit(lambda p, x: model(p, x) @ (p["w"] @ constant).T)
        adapter = adapter_of(model, params=params)
        jlora.adapt(f)(params, adapter, X)
        return [weakref.ref(a) for a in (constant, f, *jax.tree.leaves((params, adapter)))]

    references = call()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
