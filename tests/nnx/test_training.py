"""Training an adapted module with the optimisers and gradients of Flax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from tests.support.nnx_models import case, same_state

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)
OPTIMISER = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))


@nnx.jit
def step(model, optimizer, x, y):
    """A step as it is written for `nnx.LoRA`; it knows nothing of jlora."""

    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return value


class Hand(nnx.Module):
    """Two layers, with the LoRA of Flax written into the model if there are factors."""

    def __init__(self, factors=()):
        rngs = nnx.Rngs(0)
        layers: list[Any] = [nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)]
        for k, (a, b) in enumerate(factors):
            lora = nnx.LoRA(layers[k].in_features, 2, layers[k].out_features, base_module=layers[k], rngs=rngs)
            lora.lora_a[...], lora.lora_b[...] = a, b
            layers[k] = lora
        self.layers = nnx.List(layers)

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def test_a_loop_for_the_lora_of_flax_trains_the_same_factors():
    model = jlora.nnx.adapt(Hand(), {".*kernel": jlora.LoRA(2)}, X, rngs=nnx.Rngs(1))
    adapter = jlora.nnx.adapter(model)
    paths = ["layers/0/kernel", "layers/1/kernel"]
    reference = Hand([(adapter[path]["a"], adapter[path]["b"]) for path in paths])
    losses = []
    for each in (model, reference):
        optimizer = nnx.Optimizer(each, OPTIMISER, wrt=nnx.LoRAParam)
        losses.append([step(each, optimizer, X, Y) for _ in range(3)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][2] < losses[0][0]
    for path, layer in zip(paths, reference.layers, strict=True):
        trained = jlora.nnx.adapter(model)[path]
        assert not np.array_equal(trained["b"], adapter[path]["b"])
        np.testing.assert_allclose(trained["a"], layer.lora_a[...], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(trained["b"], layer.lora_b[...], rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_gradients_are_those_of_the_merged_weights():
    """By the chain rule: with W = W0 + A B, the gradient of A is G Bᵀ and that of B is Aᵀ G."""
    each = case("batch_norm")
    model = each.adapted()
    updates, plain = jlora.nnx.adapter(model), jlora.nnx.merge(model)
    for module in (model, plain):
        module.eval()

    def loss(module):
        return jnp.mean((module(each.x) - Y[:4]) ** 2)

    wrt_weights = nnx.grad(loss)(plain)
    wrt_factors = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    for name in ("up", "down"):
        g, update = wrt_weights[name]["kernel"][...], updates[f"{name}/kernel"]
        grads = wrt_factors[name]["kernel_lora"]["update"]["factors"]
        np.testing.assert_allclose(grads["a"][...], g @ update["b"].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads["b"][...], update["a"].T @ g, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_a_step_changes_factors_and_state_alone():
    each = case("batch_norm")
    model, plain = each.adapted(), each.adapted()
    optimizer = nnx.Optimizer(model, OPTIMISER, wrt=nnx.LoRAParam)
    step(model, optimizer, each.x, Y[:4])
    nnx.jit(lambda module, x: module(x))(plain, each.x)
    same_state(jlora.nnx.base(model), jlora.nnx.base(plain))
    for path, before in nnx.to_flat_state(nnx.state(each.module, nnx.Param)):
        np.testing.assert_array_equal(dict(nnx.to_flat_state(nnx.state(model)))[path][...], before[...])
    assert all(
        not np.array_equal(new, old)
        for new, old in zip(
            jax.tree.leaves(jlora.nnx.adapter(model)), jax.tree.leaves(jlora.nnx.adapter(plain)), strict=True
        )
    )


@pytest.mark.nightly
def test_the_base_of_an_update_cannot_be_trained_and_other_params_can():
    each = case("batch_norm")
    model = each.adapted()
    with pytest.raises(ValueError, match=r"with respect to (up|down)/kernel, .*wrt=nnx\.LoRAParam"):
        nnx.grad(lambda module: module(each.x).sum())(model)
    chosen = nnx.Any(nnx.LoRAParam, nnx.PathContains("bias"))
    grads = nnx.grad(lambda module: module(each.x).sum(), argnums=nnx.DiffState(0, chosen))(model)
    np.testing.assert_allclose(grads["down"]["bias"][...], np.full(3, 4.0), rtol=1e-6)


@pytest.mark.nightly
def test_dropout_of_the_low_rank_branch_follows_train_and_eval():
    linear, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((64, 4))
    targets = {"kernel": jlora.LoRA(2, dropout=0.5)}
    model = jlora.nnx.adapt(linear, targets, x, rngs=nnx.Rngs(params=0, dropout=1))
    jlora.nnx.set_adapter(model, jax.tree.map(jnp.ones_like, jlora.nnx.adapter(model)))
    base = linear(x)
    call = nnx.jit(lambda module, x: module(x))
    first, second = call(model, x) - base, call(model, x) - base
    assert not np.array_equal(first, second)
    # Each row has 4 inputs, each 0 or 2, and two ranks: an update of 0, 4, 8, 12 or 16 in every column.
    np.testing.assert_allclose(first, 4 * np.round(first / 4), atol=1e-4)
    assert 4 < float(first.mean()) < 12
    model.eval()
    np.testing.assert_allclose(call(model, x) - base, np.full((64, 3), 8.0), rtol=1e-5)
    count = nnx.state(model, nnx.RngCount)["kernel_lora"]["rngs"]["count"][...]
    assert count == 2
    with pytest.raises(ValueError, match=r"dropout, which needs keys: pass rngs"):
        jlora.nnx.adapt(linear, jlora.nnx.adapter(model))


@pytest.mark.nightly
def test_methods_with_frozen_arrays_train_their_factors_alone():
    linear, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), X
    model = jlora.nnx.adapt(linear, {"kernel": jlora.LoRA(2, freeze_a=True)}, x, rngs=nnx.Rngs(1))
    assert list(nnx.state(model, nnx.LoRAParam)["kernel_lora"]["update"]) == ["factors"]
    assert list(nnx.state(model, jlora.nnx.FrozenFactor)["kernel_lora"]["update"]["frozen"]) == ["a"]
    step(model, nnx.Optimizer(model, OPTIMISER, wrt=nnx.LoRAParam), x, Y)
    np.testing.assert_allclose(model(x), jlora.nnx.merge(model)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.nightly
def test_transformations_that_need_to_know_the_factors_refuse_a_state():
    """In the state that Flax passes to optax a factor has a name and no method; by name each gets its own rate."""
    model = case("batch_norm").adapted()
    state = nnx.as_pure(nnx.state(model, nnx.LoRAParam))
    for transform in (jlora.lora_plus(), jlora.riemannian(), jlora.lora_fa_gradient()):
        with pytest.raises(ValueError, match="a state of Flax NNX"):
            transform.update(state, transform.init(state), state)
    for function in (jlora.labels, jlora.mask):
        with pytest.raises(ValueError, match="a state of Flax NNX"):
            function(state)

    def by_name(state):
        return jax.tree_util.tree_map_with_path(lambda keys, _: [k.key for k in keys if hasattr(k, "key")][-1], state)

    before, ones = jlora.nnx.adapter(model), jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam))
    rates = optax.multi_transform({"a": optax.sgd(1.0), "b": optax.sgd(16.0)}, by_name)
    nnx.Optimizer(model, rates, wrt=nnx.LoRAParam).update(model, ones)
    for path, update in jlora.nnx.adapter(model).items():
        np.testing.assert_array_equal(update["a"], before[path]["a"] - 1)
        np.testing.assert_array_equal(update["b"], before[path]["b"] - 16)
