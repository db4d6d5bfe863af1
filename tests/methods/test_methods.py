"""What every method has to do: start at the base, receive a gradient there, be saved, and run on eight devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.support import toy_model
from tests.support.checkpoints import same
from tests.support.draw import drawn
from tests.support.methods import METHODS, fitting, shapes_of_adapter
from tests.support.weight_uses import KINDS

KEY = jax.random.key(0)
PATHS = ("embed", "layers/down", "layers/up", "mix/kernel")
NAMES = sorted(METHODS)

# One method of every form in the default run, with a sixth of the others; all in the nightly run.
FORMS = {"lora", "additive", "delora", "dora", "full", "hadamard_sigmoid", "hra", "ia3_in", "lokr_both", "oft"}
MULTIPLICATIVE = {"boft", "dora", "glora", "glora_lora", "ia3", "ia3_in", "oft", "oft_shared", "road", "road_4"}
DEPENDS_ON_WEIGHT = {"deft", "deft_qr", "delora", "dora", "glora_lora", "hira", "hra", "para", "peanut", "peanut_deep"}


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FORMS else [pytest.mark.nightly]) for name in sorted(names)]


def drawn_cases(label: str) -> list[Any]:
    marks = {name: [] if name in FORMS or drawn(label, name, one_in=9) else [pytest.mark.nightly] for name in NAMES}
    return [pytest.param(name, marks=marks[name]) for name in NAMES]


def targets_of(name: str, **changes: Any) -> dict[str, jlora.Method]:
    sites = toy_model.sites()
    return {path: dataclasses.replace(fitting(name, sites[path]), **changes) for path in PATHS}


@functools.cache
def adapter_of(name: str, **changes: Any) -> dict[str, jlora.Update]:
    """A new adapter of a method, initialised in one compiled call."""

    def init(params: dict) -> dict[str, jlora.Update]:
        return jlora.init(KEY, toy_model.sites(), targets_of(name, **changes), params=params)

    return jax.jit(init)(toy_model.params())


@jax.jit
def run(params: dict, adapter: Any) -> jax.Array:
    return jlora.adapt(toy_model.model, on_dense="allow")(params, adapter, toy_model.tokens())


@jax.jit
def base(params: dict) -> jax.Array:
    return toy_model.model(params, toy_model.tokens())


@jax.jit
def derivative(params: dict, adapter: Any) -> tuple[jax.Array, Any]:
    """The output, and the gradient of a sum of it."""
    y, pull = jax.vjp(lambda adapter: run(params, adapter), adapter)
    (gradient,) = pull(jnp.cos(jnp.arange(float(y.size))).reshape(y.shape))
    return y, gradient


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Equal up to the tolerance, in units of the largest entry of all arrays."""
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=0), got, want)


@pytest.mark.parametrize("name", drawn_cases("new adapter"))
def test_a_new_adapter_leaves_the_base_program_unchanged_and_gets_a_gradient(name):
    params = toy_model.params()
    adapter = adapter_of(name)
    y, gradient = derivative(params, adapter)
    assert_close(y, base(params), 3e-6)
    for path, update in gradient.items():
        assert not update.factors or any(float(jnp.abs(g).max()) > 1e-7 for g in update.factors.values()), path
        assert all(not g.any() for g in jax.tree.leaves(update.frozen)), path


@pytest.mark.parametrize("name", sorted(MULTIPLICATIVE))
def test_a_multiplicative_method_refuses_an_offset(name):
    with pytest.raises(ValueError, match="Set offset=False"):
        adapter_of(name, offset=True)


@pytest.mark.parametrize("name", cases(METHODS.keys() - MULTIPLICATIVE))
def test_an_offset_subtracts_the_initial_factors(name):
    adapter = adapter_of(name, offset=True)
    moved = {
        path: dataclasses.replace(
            update,
            factors=toy_model.nonzero(update.factors),
            initial=toy_model.nonzero(update.factors),
        )
        for path, update in adapter.items()
    }
    assert_close(run(toy_model.params(), moved), base(toy_model.params()), 2e-4)


@pytest.mark.parametrize("name", drawn_cases("saved adapter"))
def test_a_saved_adapter_is_loaded_to_the_bit(name, tmp_path):
    adapter = toy_model.nonzero(adapter_of(name))
    jlora.save(tmp_path / "adapter", adapter)
    same(jlora.load(tmp_path / "adapter"), adapter)


@pytest.mark.parametrize("name", sorted(DEPENDS_ON_WEIGHT))
def test_unmerge_refuses_a_method_that_depends_on_the_base(name):
    with pytest.raises(ValueError, match="Keep the base parameters"):
        jlora.unmerge(toy_model.params(), adapter_of(name))


@pytest.mark.parametrize("name", cases(METHODS.keys() - DEPENDS_ON_WEIGHT))
def test_unmerge_restores_the_base(name):
    params, adapter = toy_model.params(), toy_model.nonzero(adapter_of(name))
    merged = jax.jit(jlora.merge)(params, adapter)
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(merged))
    restored = jax.jit(jlora.unmerge)(merged, adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale, rtol=1e-3), restored, params)


@pytest.mark.parametrize("name", cases(NAMES))
def test_eight_devices_compute_the_same(name):
    params, adapter = toy_model.params(), toy_model.nonzero(adapter_of(name))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {
        "embed": PartitionSpec(None, "model"),
        "layers": {"up": PartitionSpec(None, "data", "model"), "down": PartitionSpec(None, "model"), "bias": None},
        "mix": {"kernel": PartitionSpec("data"), "bias": PartitionSpec("model")},
    }
    sharded = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s or PartitionSpec())), params, specs)
    replicated = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec())), adapter)
    (want, want_gradient), (got, gradient) = derivative(params, adapter), derivative(sharded, replicated)
    assert_close(got, want, 2e-5)
    assert_close(gradient, want_gradient, 2e-5)


@jax.jit
def two_ways(params: dict, adapters: list[Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outputs of the adapted program, of weights merged one by one, and of weights merged at once."""
    one_by_one = functools.reduce(jlora.merge, adapters, params)
    return run(params, adapters), base(one_by_one), base(jlora.merge(params, adapters))


@pytest.mark.parametrize("second", cases(NAMES))
@pytest.mark.parametrize("first", ["ia3", "lokr"])
def test_two_adapters_apply_in_order(first, second):
    adapters = [toy_model.nonzero(adapter_of(first), 1), toy_model.nonzero(adapter_of(second), 2)]
    adapted, want, at_once = two_ways(toy_model.params(), adapters)
    assert_close(adapted, want, 3e-5)
    assert_close(at_once, want, 3e-5)


def test_sixty_adapters_are_one_product():
    params = toy_model.params()
    many = [toy_model.nonzero(adapter_of("lora"), seed) for seed in range(60)]
    adapted, want, _ = two_ways(params, many[:3])
    assert_close(adapted, want, 3e-5)
    programs = [str(jax.make_jaxpr(run)(params, adapters)) for adapters in (many[:1], many)]
    assert len({(text.count("dot_general"), text.count("jlora_product")) for text in programs}) == 1


# Of the kinds of weight, those that a method with networks or gains forms after all, and says so.
FORMED = {
    "dora": {"padded_and_rolled", "interpolated", "added_to_a_frozen_kernel"},
    "ia3": {"padded_and_rolled", "interpolated", "added_to_a_frozen_kernel"},
    "ia3_in": {
        "padded_and_rolled",
        "interpolated",
        "added_to_a_frozen_kernel",
        "axes_regrouped",
        "concatenated",
        "stacked",
    },
    "lokr": {
        *("added_to_a_frozen_kernel", "axes_split", "axes_regrouped", "sliced", "padded_and_rolled"),
        *("concatenated", "stacked", "interpolated", "conv_of_composite_channels", "conv_depthwise_wide"),
    },
}
# A map that sums over an axis does not commute with what mixes, cuts or looks up that axis: a rotation of rows with
# more than a rotation of columns. The window of a convolution belongs to its rows.
_NEVER = {"concatenated", "interpolated", "added_to_a_frozen_kernel", "scaled_by_vectors"}
_NEVER |= {"weights_multiplied", "weights_multiplied_and_transposed", "weights_multiplied_by_experts"}
FORMED["road"] = _NEVER | {"split", "conv_grouped", "conv_depthwise_wide", "conv_transpose_kernel"}
FORMED["oft"] = {
    *_NEVER,
    *("axes_split", "axes_regrouped", "sliced", "padded_and_rolled", "conv_1d", "conv_2d", "conv_3d"),
    *("conv_2d_of_a_dilated_input", "conv_of_composite_channels", "conv_grouped", "conv_depthwise"),
    *("conv_depthwise_wide", "conv_transpose", "conv_transpose_kernel", "take_fill", "take_clip", "take_wrap"),
    *("take_columns", "index", "index_of_one_row", "index_by_two_numbers", "index_in_each_table"),
    *("dynamic_slice_of_a_row", "tied_embedding"),
}
FACTORED = {
    "additive",
    "miss",
    "locon",
    "lora",
    "lora_offset",
    "lora_fa",
    "lora_groups",
    "adalora",
    "deft",
    "deft_qr",
    "delora",
    "hra",
    "para",
    "lora_xs",
    "vera",
}


@pytest.mark.parametrize("name", cases(FACTORED | FORMED.keys()))
def test_which_weights_are_materialised(name):
    formed = set()
    for kind in KINDS:
        params, x = kind.values(np.random.default_rng(0))
        adapter = shapes_of_adapter(kind, kind.use, params, x, name)
        if jlora.explain(kind.use, params, adapter, x).dense:
            formed.add(kind.name)
    assert formed == FORMED.get(name, set())


@pytest.mark.parametrize(("rank", "k", "m", "n"), [(4, 2, 24, 36), (8, 2, 48, 48), (6, 2, 12, 15)])
def test_a_product_of_additive_terms_in_all_its_forms(rank, k, m, n):
    """One product of low rank, networks with repeated blocks, and dense: each is the formula."""
    rng = np.random.default_rng(0)
    part = rank // k
    shapes = {f"a{j}": (m, part) for j in range(k)} | {f"b{j}": (part, n) for j in range(k)}
    factors = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((m, n), (3, m)))
    terms = [np.tile(factors[f"a{j}"], n // part) + np.tile(factors[f"b{j}"], (m // part, 1)) for j in range(k)]
    want = x @ (w + 3 / rank * np.prod(terms, axis=0))
    update = jlora.init(KEY, jlora.trace(lambda w, x: x @ w, w, x), {"": jlora.Hadamard(rank, k, "additive", 3.0)})[""]
    adapter = {"": dataclasses.replace(update, factors=factors)}
    got = jlora.adapt(lambda w, x: x @ w, on_dense="allow")(w, adapter, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(x @ jlora.merge(w, adapter), want, atol=1e-5 * np.abs(want).max())


def test_a_reshaped_convolution_is_factored_where_that_is_cheaper():
    def program(w, x):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    w, x = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32), jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32)
    for rank, dense in ((4, 0), (8, 1)):
        adapter = jlora.init(KEY, jlora.trace(program, w, x), jlora.ConvLoRA(rank))
        assert len(jlora.explain(program, w, adapter, x).dense) == dense


def test_lora_xs_moves_between_the_leading_singular_vectors():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(9, 7)).astype(np.float32)
    sites = jlora.trace(lambda w, x: x @ w, w, w.T)
    update = jlora.init(KEY, sites, {"": jlora.LoRAXS(3, alpha=6.0)}, params=w)[""]
    r = rng.normal(size=(3, 3)).astype(np.float32)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    sign = np.sign(np.diag(u[:, :3].T @ update.frozen["a"]))
    want = w + 2 * (u[:, :3] * s[:3] * sign) @ r @ (sign[:, None] * vt[:3])
    got = jlora.merge(w, {"": dataclasses.replace(update, factors={"r": r})})
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("groups", "window"), [(1, (3,)), (1, (2, 2)), (2, (2, 2)), (3, (2, 2, 2)), (1, (3, 1))])
def test_a_convolution_the_original_librarys_way(groups, window):
    """The product, read in the order (out, in / groups, *window), against the same in NumPy."""
    n_in, n_out, last = 3, 12, window[-1]
    rng = np.random.default_rng(0)
    layout = ("NCHWD"[: len(window) + 2], "HWD"[: len(window)] + "IO", "NCHWD"[: len(window) + 2])
    w = rng.normal(size=(*window, n_in, n_out)).astype(np.float32)
    x = rng.normal(size=(2, n_in * groups, *[5] * len(window))).astype(np.float32)

    def program(w, x):
        return jax.lax.conv_general_dilated(
            x, w, [1] * len(window), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    update = jlora.init(KEY, jlora.trace(program, w, x), {"": jlora.ConvLoRA(2, 6.0, groups)})[""]
    assert update.factors["a"].shape == (n_in * groups * last, 2 * last)
    assert update.factors["b"].shape == (2 * last, n_out * np.prod(window[:-1], dtype=int) // groups)
    factors = {name: rng.normal(size=f.shape).astype(np.float32) for name, f in update.factors.items()}
    kernel = (factors["b"].T @ factors["a"].T).reshape(n_out, n_in, *window)
    want = w + 3 * np.moveaxis(kernel, (0, 1), (-1, -2))
    adapter = {"": dataclasses.replace(update, factors=factors)}
    np.testing.assert_allclose(jlora.merge(w, adapter), want, atol=1e-5 * np.abs(want).max())
    y = program(want, x)
    np.testing.assert_allclose(jlora.adapt(program, on_dense="allow")(w, adapter, x), y, atol=1e-5 * np.abs(y).max())
