"""Optimiser parts against their formulas, and what else trains beside the adapted weights."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import toy_model
from tests.support.methods import fitting

KEY = jax.random.key(0)


def updates(tx: optax.GradientTransformation, gradients: Any, adapter: Any) -> dict[str, jlora.Update]:
    """The updates of the first step, which have the adapter's structure."""
    steps, _ = tx.update(gradients, tx.init(adapter), adapter)
    return cast(dict[str, jlora.Update], steps)


def test_lora_plus_scales_b_alone():
    adapter = toy_model.adapter()
    tx = optax.chain(optax.sgd(0.5), jlora.lora_plus(8.0))
    gradients = toy_model.nonzero(adapter, 5)
    steps = updates(tx, gradients, adapter)
    for path, step in steps.items():
        np.testing.assert_allclose(step.factors["a"], -0.5 * gradients[path].factors["a"], rtol=1e-6)
        np.testing.assert_allclose(step.factors["b"], -4.0 * gradients[path].factors["b"], rtol=1e-6)


# The factors whose columns are output features, of methods that have such a factor beside one of input features.
OUTPUTS = {
    "lora": {"b"},
    "adalora": {"q"},
    "dora": {"b"},
    "hadamard": {"b0", "b1"},
    "loha": {"b0", "b1"},
    "randlora": set(),  # its "b" is a vector
    "vera": set(),  # so is this one's
    "boft": set(),
    "ia3": set(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_lora_plus_follows_the_axes_of_a_factor_and_not_its_name(name):
    sites = toy_model.sites()
    targets = {"mix/kernel": fitting(name, sites["mix/kernel"])}
    adapter = toy_model.random_adapter(sites, targets)
    steps = updates(jlora.lora_plus(8.0), adapter, adapter)["mix/kernel"].factors
    before = adapter["mix/kernel"].factors
    assert {factor for factor in steps if not np.array_equal(steps[factor], before[factor])} == OUTPUTS[name]
    for factor in OUTPUTS[name]:
        np.testing.assert_allclose(steps[factor], 8.0 * before[factor], rtol=1e-6)


def matrices(update: jlora.Update, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one layer, in and out axes joined."""
    arrays = {**update.factors, **update.frozen}
    a, b = (np.asarray(arrays[name], np.float64) for name in ("a", "b"))
    return (a[layer], b[layer]) if "stack" in update.roles else (a, b)


def test_the_riemannian_gradient():
    adapter = toy_model.adapter(jlora.LoRA(3, 6.0))
    gradients = toy_model.nonzero(adapter, 5)
    steps = updates(jlora.riemannian(1e-3), gradients, adapter)
    for path, update in adapter.items():
        (a, b), (da, db), (sa, sb) = (matrices(tree[path], 1) for tree in (adapter, gradients, steps))
        eye = 1e-3 * np.eye(update.method.rank)
        np.testing.assert_allclose(sa, da @ np.linalg.inv(b @ b.T + eye), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(sb, np.linalg.inv(a.T @ a + eye) @ db, rtol=2e-3, atol=1e-4)


def test_the_riemannian_step_does_not_care_how_the_factors_are_balanced():
    """A M and M^-1 B are the same update; plain gradients change it differently, these do not."""
    adapter = toy_model.adapter(jlora.LoRA(2))["mix/kernel"]
    mixed = jnp.array([[2.0, 1.0], [0.0, 0.5]])
    moved = dataclasses.replace(
        adapter,
        factors={"a": adapter.factors["a"] @ mixed, "b": jnp.linalg.inv(mixed) @ adapter.factors["b"]},
    )
    params, x = toy_model.params(), toy_model.tokens()

    def change(update: jlora.Update) -> jax.Array:
        one = {"mix/kernel": update}
        gradients = jax.grad(lambda a: toy_model.loss(jlora.adapt(toy_model.model)(params, a, x)))(one)
        steps = updates(jlora.riemannian(0.0), gradients, one)
        (a, b), (da, db) = (tuple(t["mix/kernel"].factors.values()) for t in (one, steps))
        return da @ b + a @ db

    first, second = change(adapter), change(moved)
    np.testing.assert_allclose(first, second, atol=1e-4 * float(jnp.abs(first).max()))


def test_the_gradient_of_lora_fa_projects_the_full_one():
    """s A dB is then the full gradient's projection onto the span of A."""
    adapter = toy_model.adapter(jlora.LoRA(3, 6.0, freeze_a=True))
    params, x = toy_model.params(), toy_model.tokens()
    full = jlora.init(KEY, toy_model.sites(), {"mix/kernel": jlora.Full()})

    def loss(adapters):
        return toy_model.loss(jlora.adapt(toy_model.model)(params, adapters, x))

    gradients, (_, whole) = jax.grad(loss)([adapter])[0], jax.grad(loss)([adapter, full])
    steps = updates(jlora.lora_fa_gradient(0.0), gradients, adapter)
    a = adapter["mix/kernel"].frozen["a"]
    got = adapter["mix/kernel"].method.scale * a @ steps["mix/kernel"].factors["b"]
    want = a @ jnp.linalg.pinv(a) @ whole["mix/kernel"].factors["d"]
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))


def test_transformations_ask_for_the_factors():
    adapter = toy_model.adapter()
    for tx in (jlora.lora_plus(), jlora.riemannian(), jlora.lora_fa_gradient()):
        with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
            tx.update(adapter, optax.EmptyState())


def test_orthogonality_is_zero_for_singular_vectors():
    adapter = toy_model.adapter(jlora.AdaLoRA(2))
    q = jax.nn.initializers.orthogonal()

    def orthogonal(update):
        *stack, _ = update.factors["e"].shape
        p = jnp.broadcast_to(q(KEY, (8, 2)), (*stack, 8, 2))
        return dataclasses.replace(update, factors={**update.factors, "p": p, "q": p.mT})

    mix = {"mix/kernel": orthogonal(adapter["mix/kernel"])}
    assert float(jlora.orthogonality(mix)) < 1e-10
    p, r = (np.asarray(adapter["mix/kernel"].factors[name], np.float64) for name in ("p", "q"))
    want = np.sum((p.T @ p - np.eye(2)) ** 2) + np.sum((r @ r.T - np.eye(2)) ** 2)
    got = jlora.orthogonality({"mix/kernel": adapter["mix/kernel"], "embed": toy_model.adapter()["embed"]})
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_biases_beside_the_adapted_weights():
    sites, kernels = toy_model.sites(), {"mix/kernel": jlora.LoRA(2)}
    targets = {which: jlora.with_biases(sites, kernels, which) for which in ("none", "lora_only", "all")}
    methods = {which: {path: type(m) for path, m in jlora.init(KEY, sites, t).items()} for which, t in targets.items()}
    assert {which: set(adapter) for which, adapter in methods.items()} == {
        "none": {"mix/kernel"},
        "lora_only": {"mix/kernel", "mix/bias"},
        "all": {"mix/kernel", "mix/bias", "layers/bias"},
    }
    update = jlora.init(KEY, sites, targets["all"])["mix/bias"]
    assert isinstance(update.method, jlora.Full)
    with pytest.raises(ValueError, match="'lora_only', not 'some'"):
        jlora.with_biases(sites, kernels, "some")  # pyright: ignore[reportArgumentType]


def test_a_restart_goes_on_from_where_it_was():
    params, adapter = toy_model.params(), toy_model.adapter()
    base, fresh = jlora.restart(KEY, toy_model.sites(), params, adapter)
    before = jlora.adapt(toy_model.model)(params, adapter, toy_model.tokens())
    after = jlora.adapt(toy_model.model)(base, fresh, toy_model.tokens())
    np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.abs(before).max()))
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter)
    assert not any(fresh[path].factors["b" if path != "embed" else "a"].any() for path in fresh)
