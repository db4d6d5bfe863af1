"""Modules of Flax NNX among the arguments of an adapted function: what a call changes is returned, or it raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


class Net(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.calls = 0

    def __call__(self, x):
        return self.norm(self.linear(x))

    def count(self, x):
        self.calls += 1
        return self.linear(x)

    def create(self, x):
        y = self.linear(x)
        self.last = nnx.Intermediate(jnp.tanh(y))
        return y

    def change_param(self, x):
        y = self.linear(x)
        self.linear.kernel[...] *= 0.5
        return y

    @nnx.jit
    def compiled(self, x):
        return self.linear(x)


def draw(params, rngs, x):
    return x @ params["w"] + rngs.noise.normal(())


@pytest.mark.parametrize(
    ("fun", "params", "args", "changed"),
    [
        (lambda net, x: net(x), Net(), (X,), "norm/mean"),
        (lambda tree, x: tree["net"](x), {"net": Net()}, (X,), "norm/mean"),
        (lambda net, x: net.count(x), Net(), (X,), "its attributes"),
        (lambda net, x: net.create(x), Net(), (X,), "last"),
        (lambda net, x: net.change_param(x), Net(), (X,), "linear/kernel"),
        (lambda net, x: (net(x), net.norm.mean[...]), Net(), (X,), "norm/var"),
        (draw, {"w": jnp.ones((4, 3))}, (nnx.Rngs(0), X), "default/count"),
    ],
    ids=["state", "in_a_tree", "attribute", "new_variable", "param", "returned_in_part", "other_argument"],
)
def test_a_change_of_a_module_that_would_be_lost_is_refused(fun, params, args, changed):
    message = rf"changes {changed} of an nnx module .*jlora\.nnx\.adapt.*nnx\.split"
    with pytest.raises(ValueError, match=message):
        jlora.trace(fun, params, *args)
    with pytest.raises(ValueError, match=message):
        jlora.adapt(fun)(params, {}, *args)


def test_a_module_that_a_call_does_not_change_is_adapted():
    """Also if `nnx.jit` returns all of it, changed or not; and batch statistics are not changed in evaluation."""

    def call(net, x):
        return net(x), net.compiled(x)

    net = Net()
    net.eval()
    adapter = jlora.init(jax.random.key(0), jlora.trace(call, net, X), {"linear/kernel": jlora.LoRA(2)})
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)
    update = adapter["linear/kernel"]
    expected = X @ (net.linear.kernel[...] + update["a"] @ update["b"])
    normalised, plain = jlora.adapt(call, on_dense="error")(net, adapter, X)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normalised, expected / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-5)


def test_a_change_that_is_returned_is_adapted():
    net = Net()
    graphdef, params, state = nnx.split(net, nnx.Param, ...)

    def by_hand(params, state, x):
        model = nnx.merge(graphdef, params, state)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    def whole(net, x):
        return net(x), nnx.state(net, nnx.Not(nnx.Param))

    for fun, given, args in ((by_hand, params, (state, X)), (whole, net, (X,))):
        adapter = jlora.init(jax.random.key(0), jlora.trace(fun, given, *args), {"linear/kernel": jlora.LoRA(2)})
        adapter = jax.tree.map(lambda a: a + 0.1, adapter)
        y, updated = jlora.adapt(fun)(given, adapter, *args)
        update = adapter["linear/kernel"]
        hidden = np.asarray(X @ (net.linear.kernel[...] + update["a"] @ update["b"]))
        np.testing.assert_allclose(updated["norm"]["mean"][...], 0.01 * hidden.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(y, (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5), rtol=1e-3, atol=1e-4)
