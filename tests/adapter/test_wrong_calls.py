"""Calls with arguments in the wrong order, of the wrong kind, or left out: each error tells what to pass."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.support import toy_model

KEY = jax.random.key(0)
ADAPTED: Any = jlora.adapt(toy_model.model)
J: Any = jlora  # calls that a type checker refuses


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, a, x: ADAPTED(p, None, x), r"found NoneType. The empty adapter, \{\}, is the base"),
        (lambda p, a, x: ADAPTED(p, jlora.bank.stack({"a": a}), x), "found Bank. jlora.bank.apply and jlora.bank.vmap"),
        (lambda p, a, x: ADAPTED(p, {"lora": a}, x), r"'lora' maps to dict. That is an adapter itself.*tree\['lora'\]"),
        (lambda p, a, x: ADAPTED(a, p, x), "Where params is an argument too, the adapter follows it"),
        (lambda p, a, x: ADAPTED(p), r"called as g\(params, adapter, \*args\), and got 1 of these 2"),
        (lambda p, a, x: ADAPTED(p, jax.tree.map(lambda _: None, a), x), "mix/kernel: the factor 'a' is None"),
        (lambda p, a, x: jlora.merge(p, jax.tree.map(lambda _: None, a)), "mix/kernel: the factor 'a' is None"),
        (lambda p, a, x: J.adapt(p), r"Expected a function f\(params, \*args\) as the first argument, found dict"),
        (lambda p, a, x: J.trace(p, toy_model.model, x), r"Expected a function .* found dict"),
        (lambda p, a, x: jlora.explain(ADAPTED, p, a, x), "explain the base function"),
        (lambda p, a, x: jlora.explain(toy_model.model, p, x), "found ArrayImpl. Where params"),
        (lambda p, a, x: jlora.shardings(p, a), "'embed' maps to ArrayImpl"),
        (lambda p, a, x: jlora.loftq(p, a, p), "'embed' maps to ArrayImpl"),
        (lambda p, a, x: J.restart(KEY, p, toy_model.sites(), a), "`sites` must come from jlora.trace, not dict"),
        (
            lambda p, a, x: J.quantize(toy_model.sites(), p, {"mix/kernel": "nf4"}),
            "`sites` must come from .*, not dict",
        ),
        (lambda p, a, x: J.quantize(p, toy_model.sites(), "nf4"), "a dict from patterns to formats.* not 'nf4'"),
        (lambda p, a, x: J.with_dropout(a, 0), r"a PRNG key, such as jax.random.key\(0\), not int"),
        (lambda p, a, x: J.init(KEY, toy_model.sites(), {"mix/kernel": jlora.LoRA}), "class LoRA, not an instance"),
    ],
)
def test_what_to_pass_is_told(call, message):
    adapter = jlora.init(KEY, toy_model.sites(), {"mix/kernel": jlora.LoRA(2)})
    with pytest.raises(TypeError, match=message):
        call(toy_model.params(), adapter, toy_model.tokens())


@pytest.mark.parametrize("pattern", ["kernel", "mix", "mix/*", "(?i)KERNEL"])
def test_a_pattern_that_matches_a_part_of_a_path(pattern):
    with pytest.raises(ValueError, match=r"matches no parameter.*It matches a part of .*mix/kernel.*: '\.\*' stands"):
        jlora.init(KEY, toy_model.sites(), {pattern: jlora.LoRA()})


def test_a_model_in_the_place_of_the_function():
    weight, x = jnp.ones((3, 3)), jnp.ones(3)
    sites = jlora.trace(lambda x: jnp.tanh(weight @ x), x)  # the input is taken for the parameters
    with pytest.raises(ValueError, match=r"one array without a path.*pass the model's parameters before it"):
        jlora.init(KEY, sites, {".*weight": jlora.LoRA(1)})


def test_a_value_that_is_not_known_while_a_function_is_traced():
    def model(params, x, train):
        return x @ params["w"] if train else x

    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        jlora.trace(model, {"w": jnp.ones((2, 2))}, jnp.ones(2), train=jnp.asarray(True))
    assert "values[2] is kwargs['train']" in raised.value.__notes__[-1]
    assert "static_argnames" in raised.value.__notes__[-1]
