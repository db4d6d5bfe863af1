"""Libraries whose unit is a layer: a program is built of their layers, and transformed by JAX around them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._peers import forms
from benchmarks._peers.forms import Spec
from benchmarks._peers.tries import Attempt, Attempts, Tree
from tests.support.programs import Program
from tests.support.weight_uses import Kind


class Layer(NamedTuple):
    """A library's adapted layer, in functional form.

    Arguments:
        factors: as the library makes them; empty if it makes none.
        apply: `apply(w, factors, *inputs) -> y`, with the weight in the layer's own order.
        change: `change(factors) -> s A B`, written by hand, in the shape of `w`.
    """

    factors: Tree
    apply: Callable[..., jax.Array]
    change: Callable[[Tree], jax.Array]


# build(spec, w, *inputs) -> layer, on arrays of the shapes that it is applied to
Build = Callable[..., Layer]


class _Call(NamedTuple):
    """A layer that a form calls: its spec, and arrays of the shapes of its weight and inputs."""

    spec: Spec
    w: np.ndarray
    inputs: tuple[Any, ...]


def calls_of(kind: Kind, params: Tree, x: Tree) -> dict[str, _Call]:
    """The layers of a kind's form."""
    calls: dict[str, _Call] = {}

    def call(name: str, spec: Spec, w: jax.Array, *inputs: Any, factors: Tree = None) -> jax.Array:
        ordered = w.transpose(spec.order) if spec.order else w
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), (ordered, inputs))
        calls[name] = _Call(spec, *zeros)
        return forms.plain(spec, ordered, *inputs)

    shapes = jax.eval_shape(lambda p, x: forms.form_of(kind).run(call, p, {}, **x), params, x)
    expected = jax.eval_shape(kind.use, params, x)
    assert shapes.shape == expected.shape, f"the form of {kind.name} gives {shapes}, not {expected}"
    return calls


def attempts(build: Build) -> Attempts:
    """The tries of a library that has `build`."""

    def attempt(kind: Kind, program: Program, params: Tree, x: Tree) -> Attempt:
        form = forms.form_of(kind)
        single = jax.tree.map(lambda a: a[0], params) if program.copies else params
        calls = calls_of(kind, single, x)
        layers = {name: build(call.spec, call.w, *call.inputs) for name, call in calls.items()}

        def use(both: Tree, x: Tree) -> jax.Array:
            def call(name: str, spec: Spec, w: jax.Array, *inputs: Any, factors: Tree = None) -> jax.Array:
                ordered = w.transpose(spec.order) if spec.order else w
                own = both["factors"].get(name, {}) if factors is None else factors
                return layers[name].apply(ordered, own, *inputs)

            return form.run(call, both["params"], both["factors"], **x)

        def side(params: Tree, factors: Tree, x: Tree) -> Tree:
            out = program.build(use)({"params": params, "factors": factors}, x)
            return (out[0], out[1]["params"]) if program.name == "handed_out" else out

        lead = tuple(n for n in (program.copies, form.stack) if n)
        adapter = {
            name: jax.tree.map(lambda a: jax.ShapeDtypeStruct((*lead, *a.shape), a.dtype), layer.factors)
            for name, layer in layers.items()
            if jax.tree.leaves(layer.factors)
        }

        def change(adapter: Tree) -> dict[str, jax.Array]:
            out = {}
            for name, factors in adapter.items():
                one: Callable[[Tree], jax.Array] = layers[name].change
                for _ in lead:
                    one = jax.vmap(one)
                delta, order = one(factors), calls[name].spec.order
                back = [*range(len(lead)), *(len(lead) + order.index(k) for k in range(len(order)))]
                out[name] = delta.transpose(back) if order else delta
            return out

        return Attempt(side, adapter, change)

    return attempt


def product(equation: str, a: Any, b: Any) -> jax.Array:
    """A B in float32."""
    return jnp.einsum(equation, a, b, precision="highest")


def einsum_change(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A B of an einsum whose factor `a` has the axes that the inputs share, and `b` the others."""
    inputs, weight = equation.split("->")[0].split(",")
    rows = "".join(letter for letter in weight if letter in inputs)
    columns = "".join(letter for letter in weight if letter not in inputs)
    return product(f"{rows}Z,Z{columns}->{weight}", a, b)
