"""Layouts of experts in PEFT's files: fused projections, a module for each expert, `target_parameters` before 0.19."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io.peft import Module
from tests.support import toy_model
from tests.support.peft_files import change_configuration, change_tensors, golden, program, unpack
from tests.support.peft_models import MODELS

E, D, F = 3, 4, 6
ROLES = {".*": ("stack", "in", "out")}


def separate(params: Any, x: jax.Array) -> jax.Array:
    gate, up = (jnp.einsum("etd,edf->etf", x, params[name]) for name in ("gate", "up"))
    return jnp.einsum("etf,efd->etd", gate * up, params["down"])


def fused(params: Any, x: jax.Array) -> jax.Array:
    gate, up = jnp.split(jnp.einsum("etd,edf->etf", x, params["gate_up"]), 2, -1)
    return jnp.einsum("etf,efd->etd", gate * up, params["down"])


def base(d: int = D, f: int = F) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"gate": (E, d, f), "up": (E, d, f), "down": (E, f, d)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def joined(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"gate_up": jnp.concatenate([params["gate"], params["up"]], -1), "down": params["down"]}


PARTS: jlora.peft.Names = {
    "gate": Module("experts.gate_up_proj", "parameter", part=0),
    "up": Module("experts.gate_up_proj", "parameter", part=1),
    "down": Module("experts.down_proj", "parameter"),
}
FUSED: jlora.peft.Names = {
    "gate_up": Module("experts.gate_up_proj", "parameter"),
    "down": Module("experts.down_proj", "parameter"),
}
MANY: jlora.peft.Names = {name: f"experts.{{e}}.{name}_proj" for name in ("gate", "up", "down")}
MANY_FUSED: jlora.peft.Names = {
    "gate_up": ("experts.{e}.gate_proj", "experts.{e}.up_proj"),
    "down": "experts.{e}.down_proj",
}


@pytest.mark.parametrize(("written", "read"), [(PARTS, FUSED), (MANY, MANY_FUSED), (PARTS, PARTS)])
@pytest.mark.parametrize("targets", [".*", "gate|down"])
def test_programs_with_separate_and_fused_projections(written, read, targets, tmp_path):
    """What a program with two kernels writes, one with a single kernel reads, and the same updates arrive."""
    params, x = base(), jnp.ones((E, 2, D))
    sites = jlora.trace(separate, params, x, roles=ROLES)
    adapter = toy_model.random_adapter(sites, {targets: jlora.LoRA(2, 3.0)})
    jlora.peft.save(tmp_path / "a", adapter, written, params=params)
    merged = jlora.merge(params, adapter)
    if read is not PARTS:
        params, merged, sites = joined(params), joined(merged), jlora.trace(fused, joined(params), x, roles=ROLES)
    again = jlora.merge(params, jlora.peft.load(tmp_path / "a", sites, read, params=params))
    for name in params:
        np.testing.assert_allclose(again[name], merged[name], rtol=1e-5, atol=1e-5)


def earlier(tensors: dict[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """The tensors of experts as PEFT had them before 0.19, for parameters (experts, out, in)."""
    out = dict(tensors)
    for key in [key for key in tensors if "experts" in key and key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        rank = len(a) // experts
        out[key] = np.ascontiguousarray(b.reshape(-1, rank, experts).transpose(2, 1, 0)).reshape(experts * rank, -1)
        out[other] = np.ascontiguousarray(a.reshape(experts, rank, -1).transpose(2, 1, 0)).reshape(-1, rank * experts)
    return out


@pytest.mark.parametrize("version", ["0.18.0", None])
def test_experts_before_peft_0_19(version, tmp_path):
    files, (params, sites, _) = golden()["adapter"]["mixtral experts"], program("mixtral")
    names = MODELS["mixtral"].names
    expected = jlora.peft.load(unpack(files, tmp_path / "new"), sites, names, params=params)
    folder = unpack(files, tmp_path / "old")
    change_configuration(folder, peft_version=version)
    change_tensors(folder, lambda tensors: earlier(tensors, params["layers"][0]["mlp"]["down"]["kernel"].shape[0]))
    jax.tree.map(np.testing.assert_array_equal, jlora.peft.load(folder, sites, names, params=params), expected)


def test_square_experts_before_peft_0_19(tmp_path):
    """Their layout does not follow from the shapes: it is refused, unless jlora or a newer PEFT wrote the file."""
    params = base(4, 4)
    sites = jlora.trace(separate, params, jnp.ones((E, 2, 4)), roles=ROLES)
    adapter = toy_model.random_adapter(sites, {"down": jlora.LoRA(2, 2.0)})
    jlora.peft.save(tmp_path / "a", adapter, PARTS)
    for version in (None, "0.19.0", "0.21.2", "1.0.0.dev0"):
        change_configuration(tmp_path / "a", peft_version=version)
        jax.tree.map(np.testing.assert_array_equal, jlora.peft.load(tmp_path / "a", sites, PARTS), adapter)
    for fields in ({"peft_version": "0.18.1"}, {"peft_version": None, "loftq_config": {}}):
        change_configuration(tmp_path / "a", **fields)
        with pytest.raises(ValueError, match=r"experts.down_proj has as many inputs as outputs, 4, and PEFT"):
            jlora.peft.load(tmp_path / "a", sites, PARTS)
