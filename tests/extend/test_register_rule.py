"""Rules for primitives of a user."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import jlora
from jlora.extend import bind, register_rule, relabel
from tests.support.agreement import close

flip = Primitive("tests_flip")  # the transpose of a matrix
flip.def_impl(lambda a: a.T)
flip.def_abstract_eval(lambda a: jax.typeof(jax.ShapeDtypeStruct(a.shape[::-1], a.dtype)))
ad.deflinear2(flip, lambda g, _: [flip.bind(g)])
mlir.register_lowering(flip, mlir.lower_fun(lambda a: a.T, multiple_results=False))


@register_rule(flip)
def flip_rule(ctx, eqn, f):
    """Reverses the axes."""
    (base,) = bind(eqn, f.base)
    return [relabel(f, base, f.axes[::-1])]


PARAMS = {"w": jax.random.normal(jax.random.key(0), (3, 16, 8))}
X = jax.random.normal(jax.random.key(1), (4, 8))


def network(params, x):
    def layer(total, w):
        return total + jnp.tanh(x @ jax.jit(flip.bind)(w)), None

    return jax.lax.scan(layer, jnp.zeros((4, 16)), params["w"])[0]


def test_a_rule_keeps_the_weight_factored_inside_jit_and_scan():
    adapter = jlora.init(jax.random.key(2), jlora.trace(network, PARAMS, X), jlora.LoRA(2))
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    adapted = jax.jit(jlora.adapt(network, on_dense="error"))
    close(adapted(PARAMS, adapter, X), network(jlora.merge(PARAMS, adapter), X), 2e-5)


@pytest.mark.parametrize("wrong", [lambda f: [f], lambda f: [], lambda f: [jnp.zeros((16, 8))]], ids=["f", "none", "x"])
def test_a_rule_with_wrong_outputs_is_refused(wrong):
    """The error blames the rule, with its module, and not jlora."""
    half = Primitive(f"tests_half_{id(wrong)}")
    half.def_impl(lambda a: a[: a.shape[0] // 2])
    half.def_abstract_eval(lambda a: jax.typeof(jax.ShapeDtypeStruct((a.shape[0] // 2, a.shape[1]), a.dtype)))

    @register_rule(half)
    def rule(ctx, eqn, f):
        return wrong(f)

    with pytest.raises(
        ValueError, match=rf"{half.name} in {__name__} returned .*; the program has \[float32\[8, 8\]\]"
    ):
        jlora.trace(lambda params, x: x @ half.bind(params["w"]), {"w": jnp.zeros((16, 8))}, jnp.zeros((4, 8)))


def test_a_second_rule_for_a_primitive_is_refused():
    for primitive in ("tests_flip", flip, "dot_general"):
        with pytest.raises(ValueError, match="has a rule already"):
            register_rule(primitive)(flip_rule)


def test_a_rule_without_a_primitive_is_refused():
    with pytest.raises(TypeError, match="primitives or their names"):
        register_rule(flip_rule)  # pyright: ignore[reportArgumentType]
