"""FRoD: its decomposition, its formula, and its files in PEFT."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.methods.frod import joint_basis
from tests.support.agreement import check_law

RECORDED = [[3.840461, 0.500858], [0.620201, 4.75556]]
NORMAL = np.random.default_rng(0).normal
PARAMS = {
    "up": jnp.asarray(NORMAL(size=(3, 6, 6)), jnp.float32),
    "side": jnp.asarray(NORMAL(size=(6, 8)), jnp.float32),
    "narrow": jnp.asarray(NORMAL(size=(8, 3)), jnp.float32),
}
X = jnp.asarray(NORMAL(size=(5, 6)), jnp.float32)


def model(params: Any, x: jax.Array) -> jax.Array:
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["up"])[0]
    return x @ params["side"] @ params["narrow"]


SITES = jlora.trace(model, PARAMS, X)
LAYERS, ALONE = jlora.FRoD(0.2), jlora.FRoD(0.2, shared="none")
TOGETHER = jlora.FRoD(0.2, shared="weights", group="six")


def new(targets: Any, moved: bool = True) -> jlora.Adapter:
    adapter, rng = jlora.init(jax.random.key(0), SITES, targets, params=PARAMS), np.random.default_rng(1)

    def move(array: jax.Array) -> jax.Array:
        return array + np.asarray(0.5 * rng.normal(size=array.shape) * moved, array.dtype)

    return {path: dataclasses.replace(u, factors=jax.tree.map(move, u.factors)) for path, u in adapter.items()}


@pytest.mark.parametrize("targets", [LAYERS, {"up|side": TOGETHER, "narrow": ALONE}], ids=["layers", "weights"])
def test_it_is_its_formula(targets):
    adapter = new(targets)
    for path, update in jlora.untie(adapter).items():
        trained, s, l0, u, v, digits = (np.asarray(update[name]) for name in ("l", "s", "l0", "u", "v", "place"))
        np.testing.assert_allclose(v @ (l0[..., None] * u), PARAMS[path], atol=1e-5)
        lengths = np.linalg.norm(u, axis=-1)
        np.testing.assert_allclose(lengths[lengths > 0], 1, atol=1e-5)
        assert v.shape == (PARAMS[path].shape[-2],) * 2  # one for all layers
        places = (digits[:, 2] * 256 + digits[:, 3]).astype(int)
        column, row = np.divmod(places, len(v))
        assert len(set(places)) == len(places)
        assert (column != row).all()
        middle = np.zeros((*trained.shape, trained.shape[-1]))
        middle[..., row, column] = s
        middle += (trained - l0)[..., None] * np.eye(trained.shape[-1])
        np.testing.assert_allclose(jlora.merge(PARAMS, adapter)[path], PARAMS[path] + v @ middle @ u, atol=1e-4)
    check_law(model, PARAMS, adapter, X)
    np.testing.assert_allclose(jlora.adapt(model)(PARAMS, new(targets, moved=False), X), model(PARAMS, X), atol=1e-5)


def test_one_group_has_one_basis_that_decomposes_all_of_its_weights():
    """The weights are [Q_i] R, and the basis is R^T E: its columns are eigenvectors of a mean of inverses."""
    adapter = new({"up|side": TOGETHER})
    assert ["v" in update.frozen for _, update in sorted(adapter.items())] == [True, False]
    weights = [*np.asarray(PARAMS["up"], np.float64), np.asarray(PARAMS["side"], np.float64)]
    q, r = np.linalg.qr(np.concatenate([weight.T for weight in weights]))
    parts = np.split(q, [6, 12, 18])
    mean = np.mean([np.linalg.inv(part.T @ part + 1e-3 * np.eye(6)) for part in parts], 0)
    v = np.asarray(adapter["side"].frozen["v"])
    vectors = np.linalg.solve(r.T, v)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(6), atol=1e-3)
    diagonal = vectors.T @ mean @ vectors
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-3 * np.abs(diagonal).max())


def test_weights_of_different_in_sizes_cannot_share_a_basis():
    with pytest.raises(ValueError, match=r"side has 6 inputs and narrow has 8.*group="):
        new({"side|narrow": TOGETHER})


def test_the_basis_is_that_of_peft():
    """Recorded with PEFT 0.21.2 for two weights, up to the signs of the columns."""
    weights = [[[1.0, 2], [0, 1], [3, -1]], [[2.0, 0], [1, 1], [0, 4]]]
    v = joint_basis([jnp.asarray(weight).T for weight in weights], 1e-3)[0]
    np.testing.assert_allclose(jnp.abs(v), RECORDED, atol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [LAYERS, pytest.param({"up": TOGETHER, "side|narrow": LAYERS}, marks=pytest.mark.nightly)],
    ids=["layers", "weights"],
)
def test_files_of_peft_keep_what_a_new_adapter_computes(targets, tmp_path):
    """Also of a narrow weight, of whose basis PEFT's U has rows that are rounding errors."""
    names = {"up": "h.{i}.up", "side": "side", "narrow": "narrow"}
    adapter = new(targets)
    (note,) = jlora.peft.save(tmp_path / "a", adapter, names, params=PARAMS)
    assert "U from a V that it computes from the base" in note
    loaded = jlora.peft.load(tmp_path / "a", SITES, names, params=PARAMS)
    assert loaded["up"].method == jlora.FRoD(0.2)
    for path, weight in jlora.merge(PARAMS, adapter).items():
        np.testing.assert_allclose(jlora.merge(PARAMS, loaded)[path], weight, atol=2e-4)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum("frod_V" in name for name in tensors) == 3
    with pytest.raises(ValueError, match="singular vectors"):
        jlora.peft.save(tmp_path / "b", adapter, names, params=jax.tree.map(lambda w: w + 0.1, PARAMS))


def test_a_category_of_peft_has_one_basis(tmp_path):
    adapter = new({"up": ALONE})
    with pytest.raises(ValueError, match=r'another V.* one for all modules of its category, up.*shared="weights"'):
        jlora.peft.save(tmp_path / "a", adapter, {"up": "h.{i}.up"}, params=PARAMS)
