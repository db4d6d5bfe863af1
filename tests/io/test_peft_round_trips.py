"""Adapters that are saved for PEFT and loaded again: random ones, stacks of unequal ranks, and vLLM's form."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jlora
from jlora.peft import Module
from tests.support import toy_model
from tests.support.agreement import close
from tests.support.peft_files import FILES, content, golden, program
from tests.support.peft_models import MODELS


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("alphas", "dtype", "stored"),
    [
        ((3.0, 9.0), jnp.bfloat16, jnp.bfloat16),
        ((3.0, 5.0), jnp.bfloat16, jnp.float32),
        ((3.0, 5.0), jnp.float32, jnp.float32),
    ],
)
def test_a_stack_whose_layers_differ_in_rank(tmp_path, alphas, dtype, stored):
    """Layers of rank 2 and 3 become one LoRA of rank 3: the numbers are the same, and zeros stay zeros."""
    model, ranks = MODELS["llama"], (2, 3)
    _, sites, _ = program("llama")
    methods = [jlora.LoRA(rank, alpha) for rank, alpha in zip(ranks, alphas, strict=True)]
    targets = {f"layers/{k}/attention/query/kernel": method for k, method in enumerate(methods)}
    given = toy_model.random_adapter(sites, targets, dtype=dtype)
    jlora.peft.save(tmp_path / "a", given, model.names)

    scanned = MODELS["llama_scanned"]
    params, sites, run = program("llama_scanned")
    adapter = jlora.peft.load(tmp_path / "a", sites, scanned.names)
    (update,) = adapter.values()
    assert isinstance(update.method, jlora.LoRA)
    assert update.method.rank == max(ranks)
    unit = update.method.scale * update.scale
    assert (update["a"].dtype, update["b"].dtype) == (dtype, stored)
    for k, (path, one) in enumerate(given.items()):
        rank, ratio = ranks[k], np.float32(methods[k].scale / unit)
        assert path == f"layers/{k}/attention/query/kernel"
        assert np.array_equal(update["a"][k, :, :rank], one["a"])
        assert np.array_equal(update["b"][k, :rank].astype(np.float32), one["b"].astype(np.float32) * ratio)
        assert not update["a"][k, :, rank:].any()
        assert not update["b"][k, rank:].any()

    x = jnp.asarray(golden()["input"]["llama"]["x"])
    apply = jlora.adapt(scanned.apply)
    gradients = jax.jit(jax.grad(lambda adapter: jnp.sin(apply(params, adapter, x)).sum()))(adapter)
    (gradient,) = gradients.values()
    assert gradient["a"][0, :, :2].any()
    assert not gradient["a"][0, :, 2:].any()
    assert not gradient["b"][0, 2:].any()
    close(run(jlora.merge(params, adapter)), program("llama")[2](jlora.merge(program("llama")[0], given)))


def test_vllm(tmp_path):
    params, sites, _ = program("llama")
    names = MODELS["llama"].names
    targets = {".*/query/kernel": jlora.LoRA(2, 3.0), ".*/up/kernel": jlora.LoRA(4, 8.0)}
    adapter = toy_model.random_adapter(sites, targets)
    notes = jlora.peft.save(tmp_path / "a", adapter, names, target="vllm")
    assert len(notes) == 2
    assert "rank 2 padded to 4, B times 0.75" in notes[0]
    config = json.loads((tmp_path / "a" / FILES[0]).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})
    again = jlora.peft.load(tmp_path / "a", sites, names)
    close(jlora.merge(params, again), jlora.merge(params, adapter))
    for method in (jlora.DoRA(2), jlora.IA3("in")):
        other = toy_model.random_adapter(sites, {".*/up/kernel": method})
        with pytest.raises(ValueError, match="no LoRA is smaller"):
            jlora.peft.save(tmp_path / "b", other, names, params=params, target="vllm")
    with_full = jlora.init(jax.random.key(0), sites, targets | {"norm/scale": jlora.Full()})
    with pytest.raises(ValueError, match="vLLM takes LoRA alone"):
        jlora.peft.save(tmp_path / "b", with_full, names, params=params, target="vllm")
    with pytest.raises(ValueError, match="target is one of"):
        jlora.peft.save(tmp_path / "b", adapter, names, target="tgi")
    assert not (tmp_path / "b").exists()


@st.composite
def weights(draw):
    """A program of one weight, stacked or not, with its heads apart or not; and its map."""
    n_in, heads, width, layers = (draw(st.integers(1, 5)) for _ in range(4))
    stacked, split, fused = (draw(st.booleans()) for _ in range(3))
    shape = (2 * n_in, 2 * heads, width) if split else (2 * n_in, 2 * heads * width)
    name: Any = "m.{i}.a" if stacked else "m.a"
    names = (name, f"{name}b") if fused else name
    return ((layers, *shape) if stacked else shape), {"w": names}, stacked


CASES = (
    weights(),
    st.sampled_from([jlora.LoRA, jlora.LoHa, jlora.LoKr, jlora.VeRA]),
    st.integers(1, 3),
    st.sampled_from([None, 1.0, 3.5]),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)


@settings(max_examples=6, deadline=None)
@given(*CASES)
def test_round_trips(tmp_path_factory, case, make, rank, alpha, dtype):
    """Random methods, shapes, dtypes and stackings: what is read is what was written, to the bit."""
    round_trip(tmp_path_factory.mktemp("a"), case, make, rank, alpha, dtype)


@pytest.mark.nightly
@settings(max_examples=150, deadline=None)
@given(*CASES)
def test_many_round_trips(tmp_path_factory, case, make, rank, alpha, dtype):
    round_trip(tmp_path_factory.mktemp("a"), case, make, rank, alpha, dtype)


def round_trip(folder, case, make, rank, alpha, dtype):
    shape, names, stacked = case
    if isinstance(names["w"], tuple) and make in (jlora.LoKr, jlora.VeRA):
        names = {"w": names["w"][0]}
    method = make(rank) if make is jlora.VeRA or alpha is None else make(rank, alpha)
    params = {"w": jnp.ones(shape)}

    def use(p: dict, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, p["w"], 1) if not stacked else jnp.einsum("lbi,li...->lb...", x, p["w"])
        return y

    x = jnp.ones((shape[0], 1, shape[1]) if stacked else (1, shape[0]))
    sites = jlora.trace(use, params, x)
    assume(not method.unsupported_reason(sites["w"]))
    adapter = toy_model.random_adapter(sites, {"w": method}, dtype=dtype)
    jlora.peft.save(folder / "one", adapter, names)
    again = jlora.peft.load(folder / "one", sites, names)
    jlora.peft.save(folder / "two", again, names)
    assert content(folder / "one") == content(folder / "two")
    if make is not jlora.VeRA or dtype == jnp.float32:
        for key, array in adapter["w"].factors.items():
            assert again["w"].factors[key].dtype == array.dtype
            assert np.array_equal(array, again["w"].factors[key])
    for path, update in jlora.to_lora(again)[0].items() if make is jlora.LoRA else ():
        close(jlora.merge(params, {path: update}), jlora.merge(params, adapter))


@pytest.mark.parametrize("method", [jlora.DoRA(2), jlora.LoHa(2), jlora.VeRA(2), jlora.IA3()], ids=repr)
def test_parameters_of_experts_hold_lora_alone(tmp_path, method):
    params = {"w": jnp.ones((2, 6, 8))}
    sites = jlora.trace(lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 2])), params, jnp.ones((3, 6)))
    adapter = jlora.init(jax.random.key(0), sites, method, params=params)
    names = {"w": Module("experts.up_proj", "parameter")}
    message = rf"hold LoRA alone, not experts\.up_proj \({type(method).__name__}\).*a module for each expert"
    with pytest.raises(ValueError, match=message):
        jlora.peft.save(tmp_path / "a", adapter, names, params=params)
    jlora.peft.save(tmp_path / "b", adapter, {"w": "experts.{e}.up_proj"}, params=params)
