"""`jlora.extract`: LoRA of the difference of two checkpoints, against decompositions in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.agreement import close
from tests.support.weight_uses import KINDS

BASE = toy_model.params()
MATRICES = ("embed", "layers/up", "layers/down", "mix/kernel")
BIASES = ("layers/bias", "mix/bias")


def tuned() -> Any:
    """The base after a full fine-tuning."""
    rng = np.random.default_rng(11)
    return jax.tree.map(lambda a: a + jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype), BASE)


def differences(after: Any, before: Any = BASE) -> dict[str, np.ndarray]:
    pairs = zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(a, np.float64) - np.asarray(b, np.float64)
        for (keys, a), b in pairs
    }


def truncated(value: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def rank_of(update: jlora.Update) -> int:
    return vars(update.method)["rank"]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank(rank):
    adapter, errors = jlora.extract(BASE, tuned(), toy_model.sites(), rank=rank)
    assert adapter.keys() == errors.keys() == {*MATRICES, *BIASES}
    want, got = differences(tuned()), differences(jlora.merge(BASE, adapter))
    for path in MATRICES:
        expected = truncated(want[path], rank)
        close(got[path], expected, 1e-5)
        axes = (-2, -1)
        error = np.linalg.norm(want[path] - expected, axis=axes) / np.linalg.norm(want[path], axis=axes)
        assert errors[path] == pytest.approx(np.max(error), rel=1e-4)
        assert rank_of(adapter[path]) == rank
    for path in BIASES:
        assert isinstance(adapter[path].method, jlora.Full)
        assert errors[path] == 0
        close(got[path], want[path], 1e-6)


def test_an_energy():
    adapter, errors = jlora.extract(BASE, tuned(), toy_model.sites(), energy=0.9)
    for path in MATRICES:
        squares = np.square(np.linalg.svd(differences(tuned())[path], compute_uv=False).reshape(-1, 8))
        rank = int(np.argmax((np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)).min(0) >= 0.9)) + 1
        assert rank_of(adapter[path]) == rank
        assert 0 < errors[path] <= 0.1**0.5
    close(jlora.merge(BASE, jlora.extract(BASE, tuned(), toy_model.sites(), energy=1.0)[0]), tuned(), 1e-6)


def test_an_adapter_that_was_merged_comes_back():
    """All that did not change is left out; saved, loaded, and run."""
    adapter = toy_model.adapter(jlora.LoRA(2, 3.0))
    del adapter["layers/up"]
    after = jlora.merge(BASE, adapter)
    again, errors = jlora.extract(BASE, after, toy_model.sites(), rank=2)
    assert again.keys() == adapter.keys()
    assert max(errors.values()) < 1e-6
    close(jlora.merge(BASE, again), after, 1e-6)
    assert jlora.extract(BASE, BASE, toy_model.sites(), rank=2) == ({}, {})


def test_the_result_is_saved(tmp_path):
    adapter, _ = jlora.extract(BASE, tuned(), toy_model.sites(), rank=2)
    jlora.save(tmp_path / "a", adapter)
    close(jlora.load(tmp_path / "a"), adapter, 0)


def test_numpy_arrays_and_narrow_dtypes():
    """Arrays of the host stay there; bfloat16 differences are exact in float64."""
    before, after = (jax.tree.map(lambda a: np.asarray(a.astype(jnp.bfloat16)), tree) for tree in (BASE, tuned()))
    adapter, _ = jlora.extract(before, after, toy_model.sites(), energy=1.0)
    assert {str(a.dtype) for a in jax.tree.leaves(adapter)} == {"float32"}
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), before)
    close(jlora.merge(wide, adapter), jax.tree.map(lambda a: np.asarray(a, np.float32), after), 1e-6)


def test_targets():
    """Ranks that differ, with the method's own scale; what is left out has the error one."""
    targets = {
        "layers/up": jlora.LoRA(2, 3.0, rank_stabilized=True, dropout=0.1),
        "layers/.*": None,
        "embed": jlora.LoRA(3, -2.0, freeze_a=True),
        "mix/kernel": jlora.Full(),
    }
    adapter, errors = jlora.extract(BASE, tuned(), toy_model.sites(), targets=targets)
    assert adapter.keys() == {"layers/up", "embed", "mix/kernel"}
    assert {path: error for path, error in errors.items() if path not in ("layers/up", "embed")} == {
        "layers/down": 1.0,
        "layers/bias": 1.0,
        "mix/bias": 1.0,
        "mix/kernel": 0.0,
    }
    assert adapter["layers/up"].method == targets["layers/up"]
    assert adapter["embed"].frozen.keys() == {"a"}
    want, got = differences(tuned()), differences(jlora.merge(BASE, adapter))
    close(got["layers/up"], truncated(want["layers/up"], 2), 1e-5)
    close(got["embed"], truncated(want["embed"], 3), 1e-5)
    close(got["mix/kernel"], want["mix/kernel"], 1e-5)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantised_base(form):
    """The difference to what the base computes, in a stack and in a matrix."""
    base = jlora.quantize(BASE, toy_model.sites(), {"mix/kernel|layers/up": form})
    plain = jax.jit(jlora.dequantize)(base)
    adapter, _ = jlora.extract(base, tuned(), toy_model.sites(), rank=3)
    got, want = differences(jlora.merge(base, adapter), plain), differences(tuned(), plain)
    for path in ("mix/kernel", "layers/up"):
        close(got[path], truncated(want[path], 3), 1e-5)


class OnDisk:
    """An array that is read in parts, and how many numbers each part had."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype, self.reads = np.asarray(array), array.shape, array.dtype, []

    def __getitem__(self, index: Any) -> np.ndarray:
        self.reads.append(self.array[index].size)
        return self.array[index]


def test_a_stack_is_read_one_layer_at_a_time():
    before, after = (jax.tree.map(OnDisk, tree) for tree in (BASE, tuned()))
    adapter, errors = jlora.extract(before, after, toy_model.sites(), energy=0.9)
    expected, expected_errors = jlora.extract(BASE, tuned(), toy_model.sites(), energy=0.9)
    close(adapter, expected, 0)
    assert errors == expected_errors
    for leaf in (before["layers"]["up"], after["layers"]["up"]):
        assert set(leaf.reads) == {toy_model.WIDTH * toy_model.HIDDEN}


FEW = {"conv_2d", "conv_grouped", "dense_general_in_axes", "experts", "kernel_out_in", "tied_embedding"}


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    "kind", [pytest.param(k, id=k.name, marks=[] if k.name in FEW else [pytest.mark.nightly]) for k in KINDS]
)
def test_kinds_of_weight(kind):
    """At full rank the second checkpoint comes back."""
    rng = np.random.default_rng(0)
    params, inputs = jax.tree.map(jnp.asarray, kind.values(rng))
    after = {name: a + jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype) for name, a in params.items()}
    adapter, errors = jlora.extract(params, after, jlora.trace(kind.use, params, inputs), energy=1.0)
    assert adapter.keys() == params.keys()
    assert {type(adapter[name].method) for name in kind.weights} == {jlora.LoRA}
    assert max(errors.values()) < 1e-6
    close(jlora.merge(params, adapter), after, 1e-6)


def test_a_parameter_that_is_not_floating_point():
    def program(p: dict, x: jax.Array) -> jax.Array:
        return (x @ p["w"])[p["order"]]

    base = {"w": jnp.ones((2, 3)), "order": jnp.arange(4)}
    sites = jlora.trace(program, base, jnp.ones((4, 2)))
    assert jlora.extract(base, base | {"w": 2 * base["w"]}, sites, rank=1)[0].keys() == {"w"}
    after = base | {"order": base["order"][::-1]}
    with pytest.raises(ValueError, match="order differs, and an adapter cannot change a parameter of dtype int32"):
        jlora.extract(base, after, sites, rank=1)
    assert jlora.extract(base, after, sites, targets={"w": jlora.LoRA(1)}) == ({}, {"order": 1.0})


def call(before: Any = BASE, after: Any = None, sites: Any = None, **options: Any) -> Any:
    after = tuned() if after is None else after
    return jlora.extract(before, after, sites or toy_model.sites(), **options)


WITHOUT = {key: value for key, value in BASE.items() if key != "embed"}
LORA = {"embed": jlora.LoRA(2)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "Pass a rank or an energy"),
        ({"rank": 2, "targets": LORA}, ValueError, "Pass a rank or an energy"),
        ({"rank": -1}, ValueError, "positive integer"),
        ({"energy": 0}, ValueError, r"in \(0, 1\]"),
        ({"rank": 2, "sites": {"embed": 1}}, TypeError, r"must come from jlora\.trace"),
        ({"rank": 2, "before": WITHOUT}, ValueError, "embed: not in `base`"),
        ({"rank": 2, "after": WITHOUT}, ValueError, "embed: not in `tuned`"),
        ({"rank": 2, "after": BASE | {"more": jnp.ones(2)}}, ValueError, "more: in `tuned`, but not in `sites`"),
        ({"rank": 2, "after": BASE | {"embed": jnp.ones((8, 11))}}, ValueError, r"embed: shape \(8, 11\) in `tuned`"),
        (
            {"rank": 2, "after": BASE | {"embed": BASE["embed"] / 0}},
            ValueError,
            "embed: the difference cannot be decomp",
        ),
        ({"targets": {"embed": jlora.DoRA(2)}}, TypeError, r"jlora\.LoRA\(rank\), jlora\.Full\(\) or None"),
        ({"targets": {"nothing": jlora.LoRA(2)}}, ValueError, "matches no parameter"),
        ({"targets": {"embed": jlora.LoRA(9)}}, ValueError, "embed .* cannot become .* rank 9 is above"),
        ({"targets": {"mix/bias": jlora.LoRA(1)}}, ValueError, "mix/bias .* cannot become"),
        ({"targets": {"embed": jlora.LoRA(2, start="pissa")}}, ValueError, "without offset and start"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)
