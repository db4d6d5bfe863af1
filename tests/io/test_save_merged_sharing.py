"""Merged models whose tensors several parameters, layers or devices hold, and numbers that a dtype cannot hold."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jlora

rng = np.random.default_rng(0)
WIDE, SQUARE = (rng.normal(size=shape).astype(np.float32) for shape in ((12, 8), (8, 8)))


def checkpoint(folder: Path, state: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def saved(tmp_path: Path, params: Any, names: Any, like: Path) -> dict[str, np.ndarray]:
    jlora.hf.save_merged(tmp_path / "merged", params, names, like=like)
    return load_file(tmp_path / "merged" / "model.safetensors")


@pytest.mark.parametrize("weight", [WIDE, SQUARE], ids=["non-square", "square"])
def test_a_tensor_with_the_same_numbers_transposed_is_no_copy(tmp_path, weight):
    state = {"embed.weight": weight, "head.weight": weight.T.copy(), "same.weight": weight.copy()}
    like = checkpoint(tmp_path / "base", {**state, "out.weight": WIDE + 3})
    params = {"embed": jnp.asarray(weight), "out": jnp.asarray(WIDE.T + 3)}
    names = jlora.peft.infer_names(params, like, known={"embed": "embed.weight"})
    assert names.copies == {"same.weight": "embed.weight"}
    assert names.unused == ("head.weight",)
    tensors = saved(tmp_path, {**params, "embed": 2 * params["embed"]}, names, like)
    for name in ("embed.weight", "same.weight"):
        np.testing.assert_array_equal(tensors[name], 2 * weight)
    np.testing.assert_array_equal(tensors["head.weight"], weight.T)


REPEATED = {
    "a stack of one layer": lambda w: np.stack([w.T] * 3),
    "heads that are repeated": lambda w: np.repeat(w.T.reshape(8, 2, 4), 2, axis=1),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_parts_of_one_parameter_that_share_a_tensor_must_agree(tmp_path, kind):
    """A checkpoint with shared layers, whose program has a copy for each of them."""
    like = checkpoint(tmp_path / "base", {"shared.weight": SQUARE, "out.weight": WIDE})
    params = {"w": jnp.asarray(REPEATED[kind](SQUARE)), "out": jnp.asarray(WIDE.T)}
    names = jlora.peft.infer_names(params, like)
    with pytest.raises(ValueError, match=r"w shares the tensor shared\.weight with other layers of its stack"):
        saved(tmp_path, {**params, "w": params["w"].at[0, 0].add(1)}, names, like)
    tensors = saved(tmp_path, {**params, "w": 2 * params["w"]}, names, like)
    np.testing.assert_array_equal(tensors["shared.weight"], 2 * SQUARE)


def test_a_dtype_of_as_many_bits_that_cannot_hold_a_number(tmp_path):
    """bfloat16 reaches further than float16."""
    narrow = {name: w.astype(ml_dtypes.bfloat16).astype(np.float16) for name, w in (("a", WIDE), ("b", SQUARE))}
    like = checkpoint(tmp_path / "base", {f"{name}.weight": w for name, w in narrow.items()})
    params = {name: jnp.asarray(w.T).astype(jnp.bfloat16) for name, w in narrow.items()}
    names = jlora.peft.infer_names(params, like)
    with pytest.raises(ValueError, match=r"a has the number 131072, which float16, the dtype of a\.weight"):
        saved(tmp_path, {**params, "a": params["a"].at[0, 0].set(2.0**17)}, names, like)
    assert not (tmp_path / "merged").exists()


def test_a_parameter_without_numbers(tmp_path):
    like = checkpoint(tmp_path / "base", {"a.weight": WIDE, "none": np.zeros((0, 3), np.float32)})
    params = {"a": jnp.asarray(WIDE.T), "none": jnp.zeros((0, 3))}
    names = jlora.peft.infer_names(params, like)
    np.testing.assert_array_equal(saved(tmp_path, params, names, like)["a.weight"], WIDE)


@pytest.mark.parametrize("hand", [False, True])
def test_on_a_mesh_with_explicit_axes(tmp_path, hand):
    """Along its Explicit axes JAX slices nothing: here the stack, and the axis in which two tensors are joined."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    state = {f"l.{i}.{k}.weight": rng.normal(size=(8, 6)).astype(np.float32) for i in range(4) for k in "ab"}
    like = checkpoint(tmp_path / "base", state)
    joined = np.stack([np.concatenate([state[f"l.{i}.{k}.weight"] for k in "ab"]).T for i in range(4)])
    params = {"w": jax.device_put(joined, NamedSharding(mesh, PartitionSpec("x", None, "y")))}
    names = {"w": ["l.{i}.a", "l.{i}.b"]} if hand else jlora.peft.infer_names(params, like)
    tensors = saved(tmp_path, {"w": 1.5 * params["w"]}, names, like)
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensors[name], 1.5 * tensor)
