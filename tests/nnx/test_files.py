"""Adapted modules in files: as a module by Orbax, and as an adapter by jlora."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jlora
from tests.support.checkpoints import same
from tests.support.nnx_models import case


@pytest.mark.nightly
def test_a_module_comes_back_from_orbax(tmp_path):
    each = case("batch_norm")
    model, other = each.adapted(), jlora.nnx.adapt(each.module, each.targets, each.x, rngs=nnx.Rngs(7))
    model(each.x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "module", nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "module", nnx.state(other)))
    model.eval()
    other.eval()
    same(jlora.nnx.adapter(other), jlora.nnx.adapter(model))
    np.testing.assert_array_equal(other(each.x), model(each.x))


@pytest.mark.nightly
def test_an_adapter_is_saved_and_put_into_another_module(tmp_path):
    each = case("scanned")
    model = each.adapted()
    params = nnx.state(each.module, nnx.Param)
    jlora.save(tmp_path / "adapter", jlora.nnx.adapter(model), params=params)
    loaded = jlora.load(tmp_path / "adapter", params=params)
    for other in (
        jlora.nnx.adapt(each.module, loaded),
        jlora.nnx.adapt(each.module, each.targets, each.x, rngs=nnx.Rngs(7)),
    ):
        jlora.nnx.set_adapter(other, loaded)
        same(jlora.nnx.adapter(other), jlora.nnx.adapter(model))
        np.testing.assert_array_equal(other(each.x), each.adapted()(each.x))
    assert jax.tree.structure(nnx.state(other)) == jax.tree.structure(nnx.state(model))
