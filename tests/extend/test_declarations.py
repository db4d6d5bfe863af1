"""What an author of a method declares, and what its user passes: errors name the class and what to change."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import extend

FACTORS = {"a": "*stack *in rank", "b": "*stack rank *out"}
INITIALIZERS = {"a": extend.kaiming, "b": jax.nn.initializers.zeros}
J: Any = jlora  # calls that a type checker refuses


_NUMBERS = itertools.count()  # two methods of one module and name are refused


def method_of(**declared: Any) -> Any:
    body = {"factors": FACTORS, "initializers": INITIALIZERS, "networks": ("a b",)} | declared
    body |= {"__module__": f"module_{next(_NUMBERS)}_of_a_user", "__annotations__": {"rank": int, "others": object}}
    body |= {"rank": extend.positive_integer(2), "others": None}
    return type("Mine", (extend.Method,), body)


def use(method: jlora.Method) -> None:
    params, x = {"w": jnp.ones((3, 4))}, jnp.ones(3)
    sites = jlora.trace(lambda params, x: x @ params["w"], params, x)
    jlora.merge(params, jlora.init(jax.random.key(0), sites, method))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"networks": ("a c",)}, "Mine.networks names the array 'c', and `factors` declares a, b"),
        ({"networks": "a b"}, r"Mine.networks is the string 'a b': write a tuple, \('a b',\)"),
        ({"frozen": property(lambda self: ("z",))}, "Mine.frozen names the array 'z', and `factors` declares a, b"),
        ({"frozen": property(lambda self: "b")}, "Mine.frozen is the string 'b': return a tuple"),
        ({"lower": lambda self, update, w: None}, "Mine.lower returned NoneType: return the weight"),
        ({"factors": FACTORS | {"a": "*stack *inn rank"}}, r"declares the axes '\*inn'; the groups .* are '\*stack'"),
    ],
)
def test_a_declaration_that_cannot_be_meant(declared, message):
    method = dataclasses.dataclass(frozen=True)(method_of(**declared))
    with pytest.raises((TypeError, ValueError), match=message):
        use(method(2))


def test_a_class_that_is_not_a_dataclass():
    with pytest.raises(TypeError, match=r"Mine declares fields: put @dataclasses.dataclass\(frozen=True\) above"):
        method_of()()


def test_a_hyper_parameter_without_a_hash():
    with pytest.raises(TypeError, match="Mine's others is of type list, which has no hash"):
        use(dataclasses.dataclass(frozen=True)(method_of())(2, [1, 2]))


def test_a_list_becomes_the_tuple_that_a_method_takes():
    assert J.Rows([1, 2]) == jlora.Rows((1, 2))
    assert J.GroupedLoRA(2, groups=2, enable=[True, False]) == jlora.GroupedLoRA(2, groups=2, enable=(True, False))
    assert J.RandLoRA(4, matrices=[8, 8]) == jlora.RandLoRA(4, matrices=(8, 8))
