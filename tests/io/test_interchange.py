"""Adapters in the serialisation of other libraries: `flax.serialization`, `jax.export`, pickle and copy."""

import copy
import pickle
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax import export

import jlora
from tests.support import toy_model
from tests.support.checkpoints import same
from tests.support.methods import fitting, some


def adapter_of(name):
    sites = toy_model.sites()
    targets = {path: fitting(name, sites[path]) for path in ("mix/kernel", "layers/up")}
    return toy_model.random_adapter(sites, targets, params=toy_model.params())


@pytest.mark.parametrize("name", some("interchange", "lora", "dora"))
def test_through_flax(name):
    adapter = jlora.scale(adapter_of(name), 0.5)
    blank = jax.tree.map(jnp.zeros_like, adapter)
    same(flax.serialization.from_bytes(blank, flax.serialization.to_bytes(adapter)), adapter)


def test_a_train_state_through_flax():
    """The optimiser's state has one more adapter for each moment."""
    adapter = adapter_of("dora")
    f = jlora.adapt(toy_model.model)

    tx = optax.adam(1e-2)

    def new(params):
        return train_state.TrainState.create(apply_fn=f, params=params, tx=tx)

    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        state = new(adapter).apply_gradients(grads=jax.tree.map(jnp.ones_like, adapter))
    back = flax.serialization.from_bytes(new(adapter), flax.serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)


def test_masks_and_ranks_through_flax():
    adapter = jlora.with_rank(adapter_of("lora"), jax.random.key(0))
    same(flax.serialization.from_bytes(adapter, flax.serialization.to_bytes(adapter)), adapter)
    without_keys = adapter_of("lora")
    with_keys = jlora.with_dropout(without_keys, jax.random.key(0))
    same(flax.serialization.from_bytes(with_keys, flax.serialization.to_bytes(without_keys)), with_keys)


@pytest.mark.parametrize("other", [jlora.LoRA(2, alpha=7.0), jlora.LoRA(3), jlora.DoRA(2)], ids=repr)
def test_another_target_is_refused(other):
    sites = toy_model.sites()
    adapter, target = (jlora.init(jax.random.key(0), sites, {"mix/kernel": m}) for m in (jlora.LoRA(2), other))
    with pytest.raises(ValueError, match=r"update at .*mix/kernel is of another kind(.|\n)*jlora.load"):
        flax.serialization.from_bytes(target, flax.serialization.to_bytes(adapter))
    with pytest.raises(ValueError, match=r"another kind"):
        flax.serialization.from_bytes(jlora.scale(adapter, 2), flax.serialization.to_bytes(adapter))


def test_arrays_of_other_shapes_are_refused():
    adapter = {"mix/kernel": adapter_of("lora")["mix/kernel"]}
    state = flax.serialization.to_state_dict(adapter)
    state["mix/kernel"]["factors"]["a"] = state["mix/kernel"]["factors"]["a"][:1]
    with pytest.raises(ValueError, match="mix/kernel has arrays of the shapes"):
        flax.serialization.from_state_dict(adapter, state)


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "order",
    ["import flax.serialization, jlora", "import jlora, flax.serialization", "import jlora; MAKE; import flax"],
)
def test_flax_may_be_imported_at_any_time(order):
    """Also after the adapter was made."""
    make = (
        "p = {'w': jax.numpy.ones((4, 3))}; sites = jlora.trace(lambda p, x: x @ p['w'], p, jax.numpy.ones((2, 4)));"
        "adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(2))"
    )
    program = f"""
import sys, jax
{order.replace("MAKE", make)}
{make if "MAKE" not in order else ""}
import flax.serialization as s
back = s.from_bytes(jax.tree.map(jax.numpy.zeros_like, adapter), s.to_bytes(adapter))
print(all((a == b).all() for a, b in zip(jax.tree.leaves(adapter), jax.tree.leaves(back))), type(back["w"]).__name__)
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["True", "Update"]


@pytest.mark.parametrize("name", some("interchange", "lora", "dora"))
def test_through_jax_export(name):
    """An adapter as an argument, and its gradient as a result."""
    adapter, params = adapter_of(name), toy_model.params()

    def program(params, adapter):
        return adapter

    data = export.export(jax.jit(program))(params, adapter).serialize()
    same(export.deserialize(data).call(params, adapter), adapter)


def test_an_adapted_program_through_jax_export():
    adapter, params, tokens = adapter_of("lora"), toy_model.params(), toy_model.tokens()
    f = jax.jit(jlora.adapt(toy_model.model))
    program = export.deserialize(export.export(f)(params, adapter, tokens).serialize(vjp_order=1))
    np.testing.assert_allclose(program.call(params, adapter, tokens), f(params, adapter, tokens), rtol=1e-6)
    wrong = {"mix/kernel": adapter["mix/kernel"]}
    with pytest.raises((ValueError, TypeError)):
        program.call(params, wrong, tokens)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies(duplicate):
    adapter, sites = adapter_of("lora"), toy_model.sites()
    same(duplicate(adapter), adapter)
    assert str(duplicate(sites)) == str(sites)
    assert duplicate(sites["mix/kernel"]).roles == sites["mix/kernel"].roles
    same(
        jlora.init(jax.random.key(0), duplicate(sites), {"mix/kernel": jlora.LoRA(2)}),
        jlora.init(jax.random.key(0), sites, {"mix/kernel": jlora.LoRA(2)}),
    )
