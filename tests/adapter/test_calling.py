"""What calls an adapted function: compilers that read its signature, `disable_jit`, nobody."""

import dataclasses
import inspect
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

import jlora
from tests.support import toy_model

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32))


def model(params, x, double=False):
    return (2 if double else 1) * x @ params["w"]


def parts(fun=model):
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32))}
    return params, toy_model.random_adapter(jlora.trace(fun, params, X), jlora.LoRA(rank=2))


def variadic(*args, **kwargs):
    return model(*args, **kwargs)


def clashing(p, adapter, /, params=0):
    return model(p, adapter)


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (model, "(params, adapter, x, double=False)"),
        (variadic, "(params, adapter, *args, **kwargs)"),
        (clashing, "(_params, _adapter, adapter, /, params=0)"),
    ],
)
def test_the_signature_has_the_adapter(fun, expected):
    assert str(inspect.signature(jlora.adapt(fun))) == expected
    params, adapter = parts(fun)
    want = model(jlora.merge(params, adapter), X)
    np.testing.assert_allclose(jlora.adapt(fun)(params, adapter, X), want, atol=1e-5)


def test_arguments_are_counted_with_the_adapter():
    """By name and by number, by jit and by Equinox."""
    params, adapter = parts()
    adapted = jlora.adapt(model)
    want = model(jlora.merge(params, adapter), X, True)
    for compiled in (jax.jit(adapted, static_argnames="double"), jax.jit(adapted, static_argnums=3)):
        np.testing.assert_allclose(compiled(params, adapter, X, True), want, atol=1e-5)
    np.testing.assert_allclose(eqx.filter_jit(adapted)(params, adapter, X, double=True), want, atol=1e-5)
    (base, updates, x), _ = jax.tree.map(
        lambda a: a.donated, jax.jit(adapted, donate_argnames="x").lower(params, adapter, X).args_info
    )
    assert x
    assert not any(jax.tree.leaves((base, updates)))


def test_without_jit():
    params, adapter = parts()
    want = jax.grad(lambda a: jnp.sum(jlora.adapt(model)(params, a, X) ** 2))(adapter)
    with jax.disable_jit():
        got = jax.grad(lambda a: jnp.sum(jlora.adapt(model)(params, a, X) ** 2))(adapter)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


watched_p = Primitive("watched")
seen = []


@watched_p.def_impl
def _watched(x):
    """Remembers its operands, and which of those before are still there."""
    seen.append((weakref.ref(x), sum(ref() is not None for ref, _ in seen)))
    return x + 1


watched_p.def_abstract_eval(lambda x: x)


def test_outside_of_jit_what_is_not_read_again_is_let_go():
    def deep(params, x):
        x = model(params, x)
        for _ in range(6):
            x = watched_p.bind(x)
        return x

    params, adapter = parts()
    seen.clear()
    jlora.adapt(deep)(params, adapter, X)
    assert len(seen) == 6
    assert max(alive for _, alive in seen) <= 1


def test_a_weight_that_comes_from_the_host():
    def offloaded(params, x):
        w, _ = jax.device_put((params["w"], x), jax.memory.Space.Device)
        return x @ jax.device_put(w, jax.memory.Space.Device)

    params, adapter = parts(offloaded)
    assert jlora.explain(offloaded, params, adapter, X).dense == ()
    want = model(jlora.merge(params, adapter), X)
    np.testing.assert_allclose(jax.jit(jlora.adapt(offloaded))(params, adapter, X), want, atol=1e-5)


def test_one_array_at_two_paths_is_not_donated():
    params, adapter = parts()
    params = {"w": params["w"], "v": params["w"]}
    merged = jlora.merge(params, adapter, donate=True)
    assert not merged["v"].is_deleted()


@dataclasses.dataclass(frozen=True)
class UsersMethod(jlora.extend.Method):
    """A method that jlora does not have."""

    factors = {"d": "*weight"}  # noqa: RUF012
    initializers = {"d": jax.nn.initializers.ones}  # noqa: RUF012
    networks = ("d",)


def test_a_users_method_is_loaded_again(tmp_path):
    params, _ = parts()
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, X), UsersMethod())
    jlora.save(tmp_path / "adapter", adapter)
    assert jlora.load(tmp_path / "adapter")["w"].method == UsersMethod()


class Ranked(jlora.Method):
    """A class between `Method` and the method that is used."""

    networks = ("d",)


@dataclasses.dataclass(frozen=True, repr=False)
class ThroughAnother(Ranked):
    """A method that derives through a class of the user's."""

    factors = {"d": "*stack *in *out"}  # noqa: RUF012
    initializers = {"d": jax.nn.initializers.zeros}  # noqa: RUF012


def test_a_method_that_derives_through_another_class_is_loaded_again(tmp_path):
    params, _ = parts()
    adapter = jlora.init(jax.random.key(0), jlora.trace(model, params, X), ThroughAnother())
    jlora.save(tmp_path / "adapter", adapter)
    assert type(jlora.load(tmp_path / "adapter")["w"].method) is ThroughAnother
