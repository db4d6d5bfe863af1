"""FRoD: its decomposition, its formula, and its files in PEFT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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


NIGHTLY = [pytest.param(shared, marks=pytest.mark.nightly) for shared in ("none", "weights")]


@pytest.mark.parametrize("shared", ["layers", *NIGHTLY])
def test_peft_does_not_compute_a_basis_of_jlora(shared, tmp_path):
    """Neither of a new adapter nor of one that was saved: PEFT takes U from a basis of its own."""
    adapter = new({"up": jlora.FRoD(0.2, shared=shared)})
    jlora.save(tmp_path / "kept", adapter)
    for one in (adapter, jlora.load(tmp_path / "kept")):
        with pytest.raises(ValueError, match=r"up: jlora has computed the basis V .* jlora.save, or merge it"):
            jlora.peft.save(tmp_path / "a", one, {"up": "h.{i}.up"}, params=PARAMS)
    with pytest.raises(ValueError, match=r"up: .*peft_modules=3.* has read"):
        new({"up": jlora.FRoD(0.2, shared=shared, peft_modules=3)})


def of_peft(folder: Path) -> dict[str, np.ndarray]:
    """Writes a file as PEFT does, h.0.up to h.2.up with one V, and side with another; returns the merged weights."""
    tensors, merged, rng = {}, {}, np.random.default_rng(3)
    for kind, names in (("up", [f"h.{i}.up" for i in range(3)]), ("side", ["side"])):
        v, (rows, columns) = rng.normal(size=(6, 6)).astype(np.float32), np.array([[0, 1, 4], [3, 5, 2]])
        places = {"s_indices": np.stack([rows, columns]), "s_size": np.array([6, 6])}
        tensors |= {f"base_model.frod_{array}.{kind}": value for array, value in {"V": v, **places}.items()}
        for k, name in enumerate(names):
            weight = np.asarray(PARAMS[kind][k] if kind == "up" else PARAMS[kind], np.float64).T  # (out, in)
            u = np.linalg.solve(v, weight.T).T
            u /= np.linalg.norm(u, axis=0)
            trained, s = rng.normal(size=6).astype(np.float32), rng.normal(size=3).astype(np.float32)
            middle = np.diag(trained.astype(float))
            middle[rows, columns] = s
            merged[name] = (u @ middle @ v.T).T
            stem = f"base_model.model.{name}.frod_lambda_"
            tensors |= {f"{stem}l": trained, f"{stem}s_values": s}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "FROD", "target_modules": ["up", "side"], "sparse_rate": 0.1, "save_projection": True}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return merged


def test_a_basis_of_peft_is_written_again(tmp_path):
    """After a checkpoint too, and with all modules that share it alone, since PEFT computes it from all of these."""
    merged = of_peft(tmp_path / "peft")
    names = {"up": "h.{i}.up", "side": "side"}
    adapter = jlora.peft.load(tmp_path / "peft", SITES, names, params=PARAMS)
    assert adapter["up"].method == jlora.FRoD(0.1, peft_modules=3)
    result = jlora.merge(PARAMS, adapter)
    for k in range(3):
        np.testing.assert_allclose(result["up"][k], merged[f"h.{k}.up"], atol=1e-4)
    np.testing.assert_allclose(result["side"], merged["side"], atol=1e-4)
    jlora.save(tmp_path / "kept", adapter)
    (note,) = jlora.peft.save(tmp_path / "again", jlora.load(tmp_path / "kept"), names, params=PARAMS)
    assert "PEFT computes V from the base again" in note
    given, written = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "again"))
    assert given.keys() == written.keys()
    for name, tensor in given.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    with pytest.raises(ValueError, match="singular vectors"):
        jlora.peft.save(tmp_path / "b", adapter, names, params=jax.tree.map(lambda w: w + 0.1, PARAMS))
    apart = {"up": [PARAMS["up"][k] for k in range(3)]}
    sites = jlora.trace(lambda p, x: [x @ w for w in p["up"]], apart, X)
    tensors = {name: tensor for name, tensor in given.items() if "side" not in name}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    names = {"up/{i}": "h.{i}.up"}
    adapter = jlora.peft.load(tmp_path / "peft", sites, names, params=apart)
    assert not jlora.peft.save(tmp_path / "c", adapter, names, params=apart)[1:]
    del adapter["up/1"]
    with pytest.raises(ValueError, match=r"up/0 \(h.0.up\) is one of 3 modules .* adapter has 2.*Save all weights"):
        jlora.peft.save(tmp_path / "d", adapter, names, params=apart)
