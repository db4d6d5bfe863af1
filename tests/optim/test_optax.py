"""Labels and masks: optax reaches the factors and nothing else, weight decay included."""

from typing import cast

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.support import toy_model


@flax.struct.dataclass
class State:
    params: dict
    step: int


def tree_of(kind: str):
    """One tree that holds base and adapter, and how to take the two out of it."""
    base, adapter = toy_model.params(), toy_model.adapter()
    if kind == "dict":
        return {"base": base, "adapter": adapter}, lambda t: (t["base"], t["adapter"])
    if kind == "tuple":
        return (base, adapter), lambda t: t
    return State({"base": base, "adapter": adapter}, 0), lambda t: (t.params["base"], t.params["adapter"])


def forms():
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    return {
        "masked": lambda tree: optax.masked(adamw, jlora.mask),
        "masked, a tree": lambda tree: optax.masked(adamw, jlora.mask(tree)),
        "multi_transform": lambda tree: optax.multi_transform(
            {"a": adamw, "b": optax.sgd(1e-2), "frozen": optax.set_to_zero()}, jlora.labels
        ),
        "partition": lambda tree: optax.partition(
            {"a": adamw, "b": adamw, "frozen": optax.set_to_zero()}, jlora.labels(tree)
        ),
    }


@pytest.mark.parametrize("kind", ["dict", "tuple", "state"])
def test_labels_and_masks(kind):
    tree, parts = tree_of(kind)
    names, marks = jlora.labels(tree), jlora.mask(tree)
    chex.assert_trees_all_equal_structs(jax.tree.map(lambda _: 0, tree), jax.tree.map(lambda _: 0, names))
    base, adapter = parts(names)
    assert set(jax.tree.leaves(base)) == {"frozen"}
    assert all(update.factors == {"a": "a", "b": "b"} for update in adapter.values())
    base, adapter = parts(marks)
    assert not any(jax.tree.leaves(base))
    assert all(jax.tree.leaves(adapter))


def test_keys_are_not_trained():
    adapter = jlora.with_dropout(toy_model.adapter(jlora.LoRA(rank=2, dropout=0.1)), jax.random.key(0))
    assert all(update.key == "frozen" for update in jlora.labels(adapter).values())
    assert all(update.key is False for update in jlora.mask(adapter).values())


@pytest.mark.drawn(3)
@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("form", list(forms()))
def test_the_base_is_bitwise_unchanged_after_100_steps(kind, form):
    tree, parts = tree_of(kind)
    tx = forms()[form](tree)
    apply = jlora.adapt(toy_model.model)

    @jax.jit
    def step(tree, state):
        grads = jax.grad(lambda t: toy_model.loss(apply(*parts(t), toy_model.tokens())))(tree)
        with jax.numpy_dtype_promotion("standard"):  # Adam raises a Python float to an integer count
            updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    state = tx.init(cast(optax.Params, tree))
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if jnp.ndim(leaf)]
    trainable = sum(leaf.size for leaf in jax.tree.leaves(parts(tree)[1]))
    assert sum(sizes) <= 2 * trainable  # no optimiser state for the base
    before, start = jax.tree.map(np.array, parts(tree)), float(toy_model.loss(apply(*parts(tree), toy_model.tokens())))
    for _ in range(100):
        tree, state = step(tree, state)
    base, adapter = parts(tree)
    chex.assert_trees_all_equal(base, before[0])
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(adapter), strict=True):
        assert not np.array_equal(old, new)
    assert float(toy_model.loss(apply(base, adapter, toy_model.tokens()))) < 0.5 * start
