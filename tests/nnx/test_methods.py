"""Every way to call a module has the update: operators, dispatched methods, and arguments of any name."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora

X = jnp.asarray([[1.0, 2.0, 3.0]])
UPDATE = {"a": jnp.asarray([[1.0], [0.0], [2.0]]), "b": jnp.asarray([[1.0, -1.0, 0.5]])}
WEIGHT = np.arange(9.0).reshape(3, 3)
MERGED = WEIGHT + np.asarray([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [2.0, -2.0, 1.0]])


class Table(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(WEIGHT, jnp.float32))

    def __call__(self, x, *, module=None, function=None, self_attention=False):
        return x @ self.kernel[...]

    def __getitem__(self, rows):
        return self.kernel[...][rows]

    def __matmul__(self, x):
        return self.kernel[...] @ x

    @functools.singledispatchmethod
    def dispatched(self, x):
        return x @ self.kernel[...]


class Rows(nnx.List):
    def __call__(self, x):
        return x @ self[0][...]


class Holder(nnx.Module):
    def __init__(self, rows):
        self.rows = rows

    def __call__(self, x):
        return x @ self.rows[0][...]


def with_factors(model):
    return {path: dataclasses.replace(update, factors=UPDATE) for path, update in jlora.nnx.adapter(model).items()}


def adapted(module: Any, path="kernel", method=None, **options) -> Any:
    """The module, whose weight has the update UPDATE."""
    targets = {path: jlora.LoRA(1, alpha=1.0, **options)}
    model = jlora.nnx.adapt(module, targets, rngs=nnx.Rngs(0), method=method or (lambda model: model(X)))
    jlora.nnx.set_adapter(model, with_factors(model))
    return model


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda model: model[jnp.asarray([2, 0])], MERGED[[2, 0]]),
        (lambda model: model @ X.T, MERGED @ np.asarray(X).T),
        (lambda model: model.dispatched(X), np.asarray(X) @ MERGED),
        (lambda model: model(X, module=None, function=1, self_attention=True), np.asarray(X) @ MERGED),
    ],
    ids=["rows", "matmul", "dispatched", "keywords"],
)
def test_a_call_has_the_update(call, expected):
    np.testing.assert_allclose(call(adapted(Table())), expected)


def test_a_weight_that_no_module_holds_is_refused():
    weight = nnx.Param(jnp.asarray(WEIGHT, jnp.float32))
    np.testing.assert_allclose(adapted(Holder(nnx.List([weight])), "rows/0")(X), np.asarray(X) @ MERGED)
    with pytest.raises(ValueError, match=r"rows/0: held by no module .* attribute of a module"):
        adapted(Holder(Rows([weight])), "rows/0")
    with pytest.raises(ValueError, match=r"^0: held by no module"):
        adapted(nnx.List([weight]), "0", method=lambda rows: X @ rows[0][...])


class Bound(nnx.Module):
    def __init__(self, wrap):
        self.kernel = nnx.Param(jnp.eye(3))
        self.forward = wrap(self.apply)

    def apply(self, x):
        return x @ self.kernel[...]

    def __call__(self, x):
        return self.forward(x) + x @ self.kernel[...]


@pytest.mark.parametrize("wrap", [lambda method: method, jax.jit], ids=["plain", "jit"])
def test_a_bound_method_in_an_attribute_is_refused(wrap):
    """A copy of the module would call that of the original, which has no update."""
    with pytest.raises(ValueError, match=r"Bound\.forward: a method bound to the given module"):
        adapted(Bound(wrap))


def test_arguments_of_adapt_that_have_the_wrong_type():
    tree: Any = {"kernel": WEIGHT}
    seed: Any = 0
    input_first: Any = X
    with pytest.raises(TypeError, match=r"takes an nnx\.Module, not dict.*jlora\.adapt"):
        jlora.nnx.adapt(tree, {"kernel": jlora.LoRA(1)}, X, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"rngs is 0: pass rngs=nnx\.Rngs\(0\)"):
        jlora.nnx.adapt(Table(), {"kernel": jlora.LoRA(1)}, X, rngs=seed)
    with pytest.raises(TypeError, match=r"Targets are a method such as .*; this is ArrayImpl"):
        jlora.nnx.adapt(Table(), input_first, {"kernel": jlora.LoRA(1)}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="targets are empty"):
        jlora.nnx.adapt(Table(), {}, X, rngs=nnx.Rngs(0))


def test_a_view_switches_dropout_of_the_low_rank_branch():
    """All of the update, in each of many calls: with dropout, a call would have half of it, or twice."""
    model = adapted(Table(), dropout=0.5)
    view = nnx.view(model, deterministic=True)
    for _ in range(4):
        np.testing.assert_allclose(view(X), np.asarray(X) @ MERGED)
    assert not model.kernel_lora.deterministic


def test_an_update_is_not_applied_twice_to_an_adapted_module():
    model = jlora.nnx.adapt(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jlora.LoRA(1), jnp.ones(3), rngs=nnx.Rngs(1))
    adapter = jlora.nnx.adapter(model)
    for params in (model, nnx.state(model)):
        with pytest.raises(ValueError, match=r"kernel: the parameters hold the factors.*jlora.nnx.base\(model\)"):
            jlora.merge(params, adapter)
    with pytest.raises(ValueError, match="the update would apply twice"):
        jlora.adapt(lambda model, x: model(x))(model, adapter, jnp.ones(3))
    not_adapter: Any = model
    with pytest.raises(TypeError, match=r"jlora.nnx.adapter\(model\) is the adapter of an adapted module"):
        jlora.summary(not_adapter)
