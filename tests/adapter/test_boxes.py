"""Parameters in boxes, which annotate axes: a box has no part in a path, so one adapter fits with and without boxes."""

from typing import Any

import flax.core.meta
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.io.peft import Module
from tests.support.checkpoints import same

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
PATHS = ["params/first/bias", "params/first/kernel", "params/second/kernel"]
TARGETS = {r".*/kernel": jlora.LoRA(2)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.lecun_normal()
        x = nn.Dense(8, name="first", kernel_init=nn.with_partitioning(normal, ("in", "out")))(x)
        initializer = nn.with_logical_partitioning(normal, ("in", "out"))
        return nn.Dense(6, name="second", use_bias=False, kernel_init=initializer)(nn.relu(x))


class Noted(flax.struct.PyTreeNode, flax.core.meta.AxisMetadata):
    """A box of the user's own, whose content has another name."""

    content: Any
    note: str = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.content

    def replace_boxed(self, val):
        return self.replace(content=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


NET = Net()
PLAIN = nn.unbox(NET.init(jax.random.key(0), X))
BOXED = NET.init(jax.random.key(0), X)
NESTED = jax.tree.map(lambda a: Noted(nn.Partitioned(a, (None,) * a.ndim), "noted"), PLAIN)


def agree(value, expected):
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def apply(variables, x):
    return NET.apply(nn.unbox(variables), x)


def adapter_of(params):
    adapter = jlora.init(jax.random.key(1), jlora.trace(apply, params, X), TARGETS)
    return jax.tree.map(lambda a: a + 0.1, adapter)


ADAPTER = adapter_of(PLAIN)
EXPECTED = apply(
    {
        "params": {
            name: layer | {"kernel": layer["kernel"] + update["a"] @ update["b"]}
            for name, layer in PLAIN["params"].items()
            for update in [ADAPTER[f"params/{name}/kernel"]]
        }
    },
    X,
)


@pytest.mark.parametrize("params", [PLAIN, BOXED, NESTED], ids=["plain", "boxed", "nested"])
def test_one_adapter_fits_with_and_without_boxes(params, tmp_path):
    sites = jlora.trace(apply, params, X)
    assert list(sites) == PATHS
    same(adapter_of(params), ADAPTER)
    agree(jlora.adapt(apply)(params, ADAPTER, X), EXPECTED)
    merged = jlora.merge(params, ADAPTER)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    agree(apply(merged, X), EXPECTED)
    unmerged = jlora.unmerge(merged, ADAPTER)
    jax.tree.map(lambda a, b: agree(a, b), unmerged, params)
    new, restarted = jlora.restart(jax.random.key(0), sites, params, ADAPTER)
    agree(jlora.adapt(apply)(new, restarted, X), EXPECTED)

    quantized = jlora.quantize(params, sites, {r".*/kernel": "nf4"})
    dequantized = jlora.dequantize(quantized)
    assert jax.tree.structure(dequantized) == jax.tree.structure(params)
    value = jlora.adapt(apply)(quantized, ADAPTER, X)
    agree(value, apply(jlora.merge(dequantized, ADAPTER), X))

    jlora.save(tmp_path / "adapter", ADAPTER, params=params, hashes=True)
    for other in (PLAIN, BOXED, NESTED):
        same(jlora.load(tmp_path / "adapter", params=other), ADAPTER)
    names = {f"params/{name}/kernel": Module(f"net.{name}", "linear") for name in ("first", "second")}
    jlora.peft.save(tmp_path / "peft", ADAPTER, names)
    agree(jlora.adapt(apply)(params, jlora.peft.load(tmp_path / "peft", sites, names), X), EXPECTED)


def test_shardings_and_quantised_weights_in_boxes():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    sharded = jax.tree.map(
        lambda a: jax.device_put(a, jax.sharding.NamedSharding(mesh, spec)) if a.ndim > 1 else a, BOXED
    )
    for params in (sharded, nn.unbox(sharded)):
        assert jlora.shardings(ADAPTER, params)["params/first/kernel"]["a"].spec[0] == "d"


def test_an_adapter_that_an_earlier_release_saved_of_boxed_parameters(tmp_path):
    """It has the name of the box's content in its paths."""
    kernels = {"first": PLAIN["params"]["first"]["kernel"], "second": PLAIN["params"]["second"]["kernel"]}
    earlier = {f"params/{name}/kernel/value": ADAPTER[f"params/{name}/kernel"] for name in kernels}
    base = {"params": {name: {"kernel": {"value": kernel}} for name, kernel in kernels.items()}}
    jlora.save(tmp_path / "a", earlier, params=base, hashes=True)
    boxed = {"params": {name: {"kernel": nn.Partitioned(a, (None, None))} for name, a in kernels.items()}}
    same(jlora.load(tmp_path / "a", params=boxed), ADAPTER)
    same(jlora.load(tmp_path / "a", params=base), earlier)
    with pytest.raises(ValueError, match="near misses: params/first/kernel"):
        jlora.adapt(apply)(BOXED, jlora.load(tmp_path / "a"), X)


def test_variables_of_nnx_have_the_paths_of_their_values():
    class Two(nnx.Variable):
        pass

    state = nnx.State(
        {"layer": {"w": nnx.Param(jnp.ones((3, 4))), "pair": Two({"a": jnp.ones((4, 2)), "b": jnp.ones(2)})}}
    )
    plain = nnx.to_pure_dict(state)

    def f(p, x):
        layer = p["layer"]
        pair = layer["pair"]
        w = layer["w"]
        if isinstance(w, nnx.Variable):
            w, pair = w[...], pair.get_value()
        return x @ w @ pair["a"] + pair["b"][None]

    x = jnp.ones((2, 3))
    assert (
        list(jlora.trace(f, state, x)) == list(jlora.trace(f, plain, x)) == ["layer/pair/a", "layer/pair/b", "layer/w"]
    )
