"""`jlora.combine` against formulas in NumPy, on plain, stacked, non-square, convolution and embedding weights."""

from __future__ import annotations

import functools
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import methods, toy_model
from tests.support.agreement import adapter_for, close
from tests.support.weight_uses import KINDS

KEY = jax.random.key(5)
PARAMS = toy_model.params()
WEIGHTS = [0.7, -0.4, 1.5]
ALL_RANKS = 99  # more than any weight of these tests has


def change(adapter: dict, params: Any = None) -> dict[str, np.ndarray]:
    """What an adapter adds to each weight that it updates, in float64."""
    params = PARAMS if params is None else params
    merged, base = (leaves(tree) for tree in (jlora.merge(params, adapter), params))
    return {path: merged[path] - base[path] for path in adapter}


def leaves(tree: Any) -> dict[str, np.ndarray]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(a, np.float64) for k, a in named}


@functools.cache
def members() -> dict[str, dict[str, jlora.Update]]:
    """Three adapters: of other ranks and scales, a start that is subtracted, fewer targets, and a bias."""
    stabilised = toy_model.adapter(jlora.LoRA(3, 4.0, rank_stabilized=True), seed=1)
    offset = drawn({"mix/kernel": jlora.LoRA(2, start="pissa"), "layers/up": jlora.LoRA(1, 2.0)}, 2)
    biased = drawn({".*/(kernel|up)": jlora.LoRA(2, 3.0), ".*bias": jlora.Full()}, 3)
    return {"stabilised": jlora.scale(stabilised, 0.5), "offset": offset, "biased": biased}


def drawn(targets: Any, seed: int) -> dict[str, jlora.Update]:
    shapes = jax.eval_shape(lambda: jlora.init(KEY, toy_model.sites(), targets, params=PARAMS))
    return toy_model.nonzero(shapes, seed)


def matrices(path: str, value: np.ndarray) -> np.ndarray:
    """The layers of a weight of the toy model; a bias is one layer."""
    return value if path in ("layers/up", "layers/down") else value[None]


def summed(changes: list[dict[str, np.ndarray]], weights: list[float]) -> dict[str, np.ndarray]:
    paths = {path for each in changes for path in each}
    terms = list(zip(weights, changes, strict=True))
    return {path: np.sum([w * each[path] for w, each in terms if path in each], axis=0) for path in paths}


def off(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert got.keys() == expected.keys()
    return max(float(np.abs(got[path] - expected[path]).max() / np.abs(expected[path]).max()) for path in expected)


def test_concat_is_the_exact_sum_and_joins_ranks():
    adapters = members()
    combined, errors = jlora.combine(adapters, dict(zip(adapters, WEIGHTS, strict=True)))
    expected = summed([change(a) for a in adapters.values()], WEIGHTS)
    assert off(change(combined), expected) < 2e-6
    assert set(errors.values()) == {0.0}
    ranks = {path: vars(update.method).get("rank") for path, update in combined.items()}
    assert ranks == {
        "embed": 3,
        "layers/down": 3,
        "layers/up": 3 + 1 + 2,
        "mix/kernel": 3 + 4 + 2,  # that of a subtracted start counts twice
        "layers/bias": None,
        "mix/bias": None,
    }


def test_weights_are_one_by_default_and_zero_leaves_an_adapter_out():
    adapters = list(members().values())
    expected = summed([change(a) for a in adapters], [1, 1, 1])
    assert off(change(jlora.combine(adapters)[0]), expected) < 2e-6
    dora = toy_model.adapter(jlora.DoRA(2))  # needs no params, since it adds nothing
    combined, _ = jlora.combine([dora, adapters[0]], [0, 1])
    assert vars(combined["embed"].method)["rank"] == 3
    close(change(combined), change(adapters[0]))
    nothing, errors = jlora.combine([adapters[0]], [0])
    assert not any(np.abs(value).max() for value in change(nothing).values())
    assert set(errors.values()) == {0.0}
    assert not any(np.abs(v).max() for v in change(jlora.combine([adapters[0]], [0], how="svd", rank=2)[0]).values())


def test_a_bank_is_combined_as_its_members_are():
    adapters = {"films": toy_model.adapter(seed=1), "tweets": toy_model.adapter(jlora.LoRA(3, 5.0), seed=2)}
    weights = {"tweets": -0.5, "films": 2}
    combined, _ = jlora.combine(jlora.bank.stack(adapters), weights)
    assert vars(combined["embed"].method)["rank"] == 5
    assert off(change(combined), summed([change(adapters[name]) for name in weights], list(weights.values()))) < 2e-6


def test_scales_that_are_arrays():
    """Such as those that `jlora.scale` makes inside `jax.jit`."""
    adapters = [toy_model.adapter(seed=1), toy_model.adapter(jlora.DoRA(2), seed=2)]
    scaled = [jax.jit(jlora.scale)(adapter, 0.5) for adapter in adapters]
    combined, _ = jlora.combine(scaled, [2, -1], how="svd", rank=8, params=PARAMS)
    assert off(change(combined), summed([change(a) for a in scaled], [2, -1])) < 1e-5


def test_negation_undoes_an_adapter():
    adapter = toy_model.adapter()
    negated, _ = jlora.combine([adapter], [-1])
    close(jlora.merge(jlora.merge(PARAMS, adapter), negated), PARAMS)
    assert off(change(negated), {path: -value for path, value in change(adapter).items()}) < 2e-6


def truncated(value: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize("rank", [1, 3])
def test_svd_of_a_rank(rank):
    adapters = list(members().values())
    combined, errors = jlora.combine(adapters, WEIGHTS, how="svd", rank=rank)
    for path, value in summed([change(a) for a in adapters], WEIGHTS).items():
        if value.ndim == 1 or path == "layers/bias":
            close(change(combined)[path], value, 1e-5)
            continue
        layers = matrices(path, value)
        expected = truncated(layers, rank)
        close(matrices(path, change(combined)[path]), expected, 1e-5)
        error = np.linalg.norm(layers - expected, axis=(1, 2)) / np.linalg.norm(layers, axis=(1, 2))
        assert errors[path] == pytest.approx(error.max(), rel=1e-4, abs=1e-6)
        assert vars(combined[path].method)["rank"] == rank


def test_svd_of_an_energy_keeps_it_in_every_layer():
    adapters = list(members().values())
    combined, errors = jlora.combine(adapters, WEIGHTS, how="svd", energy=0.8)
    for path in ("embed", "layers/up", "layers/down", "mix/kernel"):
        value = matrices(path, summed([change(a) for a in adapters], WEIGHTS)[path])
        squares = np.square(np.linalg.svd(value, compute_uv=False))
        rank = int(np.argmax((np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)).min(0) >= 0.8)) + 1
        assert vars(combined[path].method)["rank"] == rank
        close(matrices(path, change(combined)[path]), truncated(value, rank), 1e-5)
        assert errors[path] <= 0.2**0.5
    capped, _ = jlora.combine(adapters, WEIGHTS, how="svd", energy=0.8, rank=1)
    assert {vars(u.method)["rank"] for u in capped.values() if isinstance(u.method, jlora.LoRA)} == {1}


def test_svd_without_a_rank_finds_that_of_the_sum():
    adapter = drawn({"layers/up": jlora.LoRA(2, 3.0)}, 4)
    twice, errors = jlora.combine([adapter, adapter], how="svd")
    assert vars(twice["layers/up"].method)["rank"] == 2
    assert errors["layers/up"] < 1e-6
    close(change(twice)["layers/up"], 2 * change(adapter)["layers/up"], 1e-5)


def test_a_method_that_depends_on_the_base():
    """The change by DoRA is that of the whole formula, times its weight."""
    dora, lora = toy_model.adapter(jlora.DoRA(2, 3.0), seed=1), toy_model.adapter(seed=2)
    with pytest.raises(ValueError, match=r"DoRA depends on the base\. Pass params"):
        jlora.combine([dora, lora], how="svd", rank=8)
    with pytest.raises(ValueError, match=r"(?s)embed: the update of DoRA in adapter 0 has rank 8 .*how='svd'"):
        jlora.combine([dora, lora], params=PARAMS)
    combined, errors = jlora.combine([dora, lora], [0.5, 2], how="svd", rank=8, params=PARAMS)
    assert off(change(combined), summed([change(dora), change(lora)], [0.5, 2])) < 1e-5
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantised_base(form):
    sites = toy_model.sites()
    base = jlora.quantize(PARAMS, sites, {"layers/up": form})
    dora = {"layers/up": toy_model.adapter(jlora.DoRA(2), seed=1)["layers/up"]}
    combined, _ = jlora.combine([dora], [0.5], how="svd", rank=8, params=base)
    plain = jax.jit(jlora.dequantize)(base)
    assert off(change(combined, plain), summed([change(dora, plain)], [0.5])) < 1e-5


DENSE = {
    *("dora", "hadamard_sigmoid", "hadamard_tanh", "hira", "ia3", "ia3_in", "oft", "boft", "randlora", "shira"),
    *("road", "road_4", "oft_shared", "randlora_shared", "glora", "glora_lora", "c3a", "frod", "frod_apart"),
    "rows_out",
}


@pytest.mark.parametrize("name", methods.some("combine", "lora", "dora", "lora_pissa"))
def test_every_method(name):
    """With the exact rule if it has an exactly equal LoRA, else with a decomposition of all ranks."""
    params = {"layers": jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 30)), jnp.float32)}

    def program(p: dict, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, w: (y, x @ w), x, p["layers"])[1]

    sites = jlora.trace(program, params, jnp.ones((3, 24)))
    method = methods.fitting(name, sites["layers"])
    shapes = jax.eval_shape(lambda: jlora.init(KEY, sites, {"layers": method}, params=params))
    adapters = [
        toy_model.nonzero(shapes, 1),
        adapter_for(sites, {"layers": jlora.LoRA(2, 3.0)}, np.random.default_rng(2)),
    ]
    expected = summed([change(a, params) for a in adapters], [0.5, 2])
    options: dict[str, Any] = {}
    if name in DENSE:
        refusal = f"layers: the update of {type(method).__name__} in adapter 0 has rank .* Combine with how='svd'"
        with pytest.raises(ValueError, match=refusal):
            jlora.combine(adapters, [0.5, 2], params=params)
        options = {"how": "svd", "rank": 24}
    combined, _ = jlora.combine(adapters, [0.5, 2], params=params, **options)
    assert off(change(combined, params), expected) < 2e-5


EIGHT = {
    *("dense_general_in_axes", "experts", "scan_stacked", "tied_embedding", "conv_grouped"),
    *("mlp", "kernel_out_in", "conv_2d"),
}


def kind_cases() -> list[Any]:
    return [pytest.param(k, id=k.name, marks=[] if k.name in EIGHT else [pytest.mark.nightly]) for k in KINDS]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("kind", kind_cases())
def test_kinds_of_weight(kind):
    """Exactly, by an SVD of the factors, and by one of the weight's change."""
    params, inputs = jax.tree.map(jnp.asarray, kind.values(np.random.default_rng(0)))
    sites = jlora.trace(kind.use, params, inputs)
    rng = np.random.default_rng(1)
    adapters = [adapter_for(sites, dict.fromkeys(kind.weights, jlora.LoRA(1, alpha)), rng) for alpha in (2.0, 3.0)]
    expected = summed([change(a, params) for a in adapters], [0.5, -2])
    for options in ({}, {"how": "svd", "rank": ALL_RANKS}, {"how": "magnitude", "density": 1.0, "rank": ALL_RANKS}):
        combined, errors = jlora.combine(adapters, [0.5, -2], **options)
        assert off(change(combined, params), expected) < 1e-5
        assert max(errors.values()) < 1e-6


def test_the_result_is_saved_loaded_and_exported(tmp_path):
    adapters = list(members().values())
    for how, options in {"concat": {}, "ties": {"density": 0.5, "rank": 3}}.items():
        combined, _ = jlora.combine(adapters, WEIGHTS, how=how, **options)
        jlora.save(tmp_path / how, combined)
        again = jlora.load(tmp_path / how)
        assert jax.tree.structure(again) == jax.tree.structure(combined)
        close(change(again), change(combined), 1e-7)
        torch = {path: update for path, update in combined.items() if path.startswith("layers/")}
        bias = jlora.peft.Module("down.{i}.bias", "parameter")
        names = {"layers/up": "up.{i}", "layers/down": "down.{i}", "layers/bias": bias}
        jlora.peft.save(tmp_path / "peft" / how, torch, names, params=PARAMS)
        loaded = jlora.peft.load(tmp_path / "peft" / how, toy_model.sites(), names, params=PARAMS)
        close(change(loaded), {path: change(combined)[path] for path in loaded}, 1e-6)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("how", ["svd", "ties", "dare"])
def test_one_layer_at_a_time(how):
    """Whatever the depth of a stack, less than half of one change is in memory."""
    layers, width, rng = 48, 48, np.random.default_rng(0)

    def stacked_lora() -> dict[str, jlora.Update]:
        shapes = {"a": (layers, width, 1), "b": (layers, 1, width)}
        factors = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        return {"w": jlora.Update(factors, jlora.LoRA(1), ("stack", "in", "out"), (layers, width, width))}

    options: dict[str, Any] = {"how": how, "rank": 1}
    options |= {"density": 0.5} if how != "svd" else {}
    options |= {"key": KEY} if how == "dare" else {}
    adapters = [stacked_lora() for _ in range(4)]
    jlora.combine(adapters, **options)  # compiles
    tracemalloc.start()
    jlora.combine(adapters, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * layers * width**2 / 2


def test_dropout_is_kept_if_all_agree():
    adapters = [drawn({"mix/kernel": jlora.LoRA(2, dropout=rate)}, 1) for rate in (0.1, 0.1, 0.2)]
    assert jlora.combine(adapters[:2])[0]["mix/kernel"].method.dropout == 0.1
    assert jlora.combine(adapters)[0]["mix/kernel"].method.dropout == 0


def test_full_updates_of_matrices():
    """Exact with "concat"; decomposed by the other rules."""
    full, lora = drawn({"mix/kernel": jlora.Full()}, 1), drawn({"mix/kernel": jlora.LoRA(2)}, 2)
    expected = summed([change(full), change(lora)], WEIGHTS[:2])
    combined, errors = jlora.combine([full, lora], WEIGHTS[:2])
    assert isinstance(combined["mix/kernel"].method, jlora.Full)
    assert errors == {"mix/kernel": 0}
    assert off(change(combined), expected) < 2e-6
    combined, errors = jlora.combine([full, lora], WEIGHTS[:2], how="svd", rank=2)
    close(change(combined)["mix/kernel"], truncated(expected["mix/kernel"], 2), 1e-5)
    with pytest.raises(ValueError, match=r"mix/kernel: the combination by 'svd' has rank 8 of at most 8"):
        jlora.combine([full, lora], how="svd")
