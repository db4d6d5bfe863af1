"""`jlora.calibrate`: the inputs of weights, against NumPy, callbacks and Jacobians; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from tests.support import toy_model
from tests.support.programs import PROGRAMS, Program
from tests.support.weight_uses import KINDS, Kind
from tests.support.weight_uses.kind import mesh

Tree = Any


def shapes_of_adapter(fun: Callable[..., Any], params: Tree, *args: Any, paths: str = ".*") -> Tree:
    sites = jlora.trace(fun, params, *args)
    return jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, {paths: jlora.LoRA(1)}))


def holds(inputs: jlora.Inputs, rows: np.ndarray) -> None:
    """Asserts that these are the sums over rows, `(rows, in)`."""
    assert float(inputs.rows) == len(rows)
    np.testing.assert_allclose(inputs.total, rows.sum(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(inputs.second, rows.T @ rows, rtol=1e-5, atol=1e-4)


def layer(inputs: jlora.Inputs, k: int) -> jlora.Inputs:
    return jax.tree.map(lambda a: a[k], inputs)


def test_layers_of_a_scan_a_square_weight_and_a_tied_embedding() -> None:
    params, paths, fun = toy_model.params(), "embed|layers/(up|down)|mix/kernel", toy_model.model
    record = jax.jit(jlora.calibrate(fun, shapes_of_adapter(fun, params, toy_model.tokens(), paths=paths)))
    batches = [np.arange(10).reshape(2, 5) % 7, np.full((2, 5), 3)]
    inputs = jax.tree.map(jnp.add, *(record(params, jnp.asarray(ids)) for ids in batches))
    ids, p = np.concatenate(batches).reshape(-1), jax.tree.map(np.asarray, params)
    x, layers = p["embed"][ids], p["layers"]
    assert inputs["embed"].second is None
    assert (np.asarray(inputs["embed"].total) == np.bincount(ids, minlength=toy_model.VOCABULARY)).all()
    for k in range(toy_model.LAYERS):
        hidden = np.tanh(x @ layers["up"][k])
        holds(layer(inputs["layers/up"], k), x)
        holds(layer(inputs["layers/down"], k), hidden)
        x = x + hidden @ layers["down"][k] + layers["bias"][k]
    holds(inputs["mix/kernel"], x)


def test_windows_of_a_convolution_and_the_rows_of_experts() -> None:
    """A weight that is split, shifted and scaled before use; an expert without rows."""
    rng = np.random.default_rng(0)
    arrays = {"conv": (3, 3, 4), "experts": (3, 4, 5), "shifted": (5, 6), "heads": (2, 3, 5)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
    x, sizes = rng.normal(size=(2, 7, 3)).astype(np.float32), np.array([4, 0, 3], np.int32)

    def fun(p: Tree, x: jax.Array, sizes: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(x, p["conv"], (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        h = jnp.concatenate([h.reshape(-1, 4), jnp.ones((3, 4))])  # two rows are in no group
        y = lax.ragged_dot(h, p["experts"], sizes)
        q, k = jnp.split(3.0 * jnp.roll(p["shifted"], 2, axis=0), 2, axis=1)
        return jnp.einsum("rhk,hko->ro", jnp.stack([y @ q, y @ k], axis=1), p["heads"])

    got = jax.jit(jlora.calibrate(fun, shapes_of_adapter(fun, params, x, sizes)))(params, x, sizes)
    windows = np.stack([x[:, k : k + 3].reshape(2, -1) for k in (0, 2, 4)], axis=1).reshape(6, 9)
    holds(got["conv"], windows)
    rows = np.concatenate([windows @ params["conv"].reshape(9, 4), np.ones((3, 4), np.float32)])
    parts = np.split(rows, np.cumsum(sizes))
    y = np.concatenate([part @ w for part, w in zip(parts, [*params["experts"], np.zeros((4, 5))], strict=True)])
    for k, part in enumerate(parts[:3]):
        holds(layer(got["experts"], k), part)
    holds(got["shifted"], np.concatenate([3 * np.roll(y, -2, axis=1)] * 2))
    moved = 3 * np.roll(params["shifted"], 2, axis=0)
    holds(got["heads"], y @ moved)


def test_statistics_of_narrow_inputs_are_as_exact_as_the_inputs() -> None:
    x = np.asarray(np.random.default_rng(0).normal(size=(300, 6)), jnp.bfloat16)
    params = {"w": jnp.ones((6, 4), jnp.bfloat16)}

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        return x @ p["w"]

    got = jax.jit(jlora.calibrate(fun, shapes_of_adapter(fun, params, x)))(params, x)["w"]
    assert got.second.dtype == jnp.float32
    holds(got, x.astype(np.float32))


@pytest.mark.nightly
def test_on_a_mesh_with_explicit_axes() -> None:
    """A kernel that is cut along both axes, a table, and a table of matrices; the batch is cut too."""
    axes = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(8, 12)), "t": rng.normal(size=(16, 8)), "h": rng.normal(size=(16, 2, 4))}
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    ids = np.arange(8) % 5

    def fun(p: Tree, ids: jax.Array) -> list[jax.Array]:
        x, y = (p[name].at[ids].get(out_sharding=P("data")) for name in ("t", "h"))
        return [jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("data")), y]

    with jax.set_mesh(axes):
        specs = {"w": P("data", "model"), "t": P(), "h": P()}
        params = {name: jax.device_put(a, NamedSharding(axes, specs[name])) for name, a in arrays.items()}
        cut_ids = jax.device_put(ids, NamedSharding(axes, P("data")))
        got = jax.jit(jlora.calibrate(fun, shapes_of_adapter(fun, params, cut_ids)))(params, cut_ids)
    holds(got["w"], arrays["t"][ids])
    for name in ("t", "h"):
        assert (np.asarray(got[name].total) == np.bincount(ids, minlength=16)).all()


@jax.custom_vjp
def opaque(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, ct: (ct @ res[1].T, res[0].T @ ct))


def cut(p: Tree, x: jax.Array) -> jax.Array:
    def body(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.psum(x @ w, "model")

    return jax.shard_map(body, mesh=mesh(), in_specs=(P(None, "model"), P("model")), out_specs=P())(x, p["w"])


REFUSED: dict[str, tuple[Callable[[Tree, jax.Array], jax.Array], str]] = {
    "a part": (lambda p, x: x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:], "contracts only a part of its in axes"),
    "a product of weights": (lambda p, x: x @ (p["w"] @ p["v"]), "it is multiplied with another parameter"),
    "materialised": (lambda p, x: opaque(x, p["w"]), "would be materialised: w: custom_vjp_call"),
    "returned": (lambda p, x: (x @ p["w"], p["w"])[1], "would be materialised: w: the program's output"),
    "cut": (cut, "the shard_map at .* cuts its in axes"),
    "no floating-point output": (lambda p, x: jnp.argmax(x @ p["w"], -1), "returns no floating-point array"),
    "a code book": (
        lambda p, x: p["w"][jnp.arange(2)].sum() * (x @ p["w"]),
        "looked up, and multiplied along the same",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name: str) -> None:
    fun, message = REFUSED[name]
    params, x = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 3))}, jnp.ones((2, 6))
    adapter = shapes_of_adapter(lambda p, x: x @ p["w"], params, x, paths="w")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jlora.calibrate(fun, adapter), params, x)


def test_an_input_behind_a_stopped_gradient_is_missed_and_said() -> None:
    params, x = {"w": jnp.ones((6, 4))}, jnp.ones((2, 6))

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        return lax.stop_gradient(x @ p["w"]) * x[:, :4]

    adapter = shapes_of_adapter(fun, params, x)
    inputs = jax.jit(jlora.calibrate(fun, adapter))(params, x)
    for start in (lambda: jlora.eva(adapter, inputs), lambda: jlora.corda(adapter, inputs, params, mode="knowledge")):
        with pytest.raises(ValueError, match="w: no input was recorded"):
            start()


# Those that the Jacobian does not show: the weight is not linear in the output, or the output is weighted.
UNLIKE = {"split", "scaled_by_vectors", "mlp", "tied_embedding", "ragged_experts", "scan_stacked", "layers_by_index"}
PARTS = {"axes_regrouped", "sliced", "weights_multiplied", "weights_multiplied_and_transposed"}
PARTS |= {"weights_multiplied_by_experts"}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name not in UNLIKE], ids=lambda kind: kind.name)
def test_every_kind_of_weight(kind: Kind) -> None:
    """The Jacobian of an output y = x w has the input x, once for every out axis."""
    params, inputs = jax.tree.map(jnp.asarray, kind.values(np.random.default_rng(0)))
    if {"rows", "row"} & inputs.keys():
        inputs["x"] = jnp.ones_like(inputs["x"])  # it multiplies what is looked up
    sites = jlora.trace(kind.use, params, inputs)
    adapter = jlora.init(jax.random.key(0), sites, {path: jlora.LoRA(1) for path in kind.weights}, params=params)
    record = jax.jit(jlora.calibrate(kind.use, adapter))
    if kind.name in PARTS:
        with pytest.raises(ValueError, match="cannot be recorded"):
            record(params, inputs)
        return
    for path, got in record(params, inputs).items():
        axes = adapter[path].axes

        def of_weight(w: jax.Array, path: str = path) -> jax.Array:
            return kind.use({**params, path: w}, inputs).astype(jnp.float32).reshape(-1)

        jacobian = np.asarray(jax.jacrev(of_weight)(params[path]))
        order = [1 + axis for group in ("*stack", "*in", "*out") for axis in axes.axes(group)]
        jacobian = jacobian.transpose(0, *order).reshape(len(jacobian), -1, axes.count("*in"), axes.count("*out"))
        rows = np.asarray(got.rows).reshape(-1)
        if kind.still:
            assert not rows.any()
            continue
        second = np.stack(list(map(np.diag, _flat(got.total, 1)))) if got.second is None else _flat(got.second, 2)
        expected = np.einsum("ysio,ysjo->sij", jacobian, jacobian)
        copies = np.trace(expected, axis1=1, axis2=2).sum() / np.trace(second, axis1=1, axis2=2).sum()
        assert copies == pytest.approx(round(copies), rel=1e-4)
        assert copies * rows.sum() <= len(jacobian) * axes.count("*out")
        np.testing.assert_allclose(copies * second, expected, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_allclose(copies * _flat(got.total, 1), np.einsum("ysio->si", jacobian), atol=1e-4)


def _flat(array: Any, axes: int) -> np.ndarray:
    array = np.asarray(array)
    return array.reshape(-1, *array.shape[array.ndim - axes :])


# A callback sees other inputs: of a weight that the loop scales, of equal devices, of derivatives in the program.
DIFFER = {"scan_carried_and_scaled", "grad_of_grad", "jvp", "grad_of_scanned_checkpoint"}
DIFFER |= {p.name for p in PROGRAMS if p.name.startswith("shard_map")}
LOOPS = {"fori_loop_of_unknown_length", "while_loop_carried"}


@pytest.mark.nightly
@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.name not in DIFFER], ids=lambda p: p.name)
def test_every_kind_of_program(program: Program) -> None:
    """A callback in the program sees the same inputs."""
    kind = next(kind for kind in KINDS if kind.name == "kernel")
    params, inputs = kind.values(np.random.default_rng(0), program.copies)
    seen: list[np.ndarray] = []

    def use(p: Tree, inputs: Tree) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), inputs["x"])
        return kind.use(p, inputs)

    fun = program.build(kind.use)
    record = jax.jit(jlora.calibrate(fun, shapes_of_adapter(fun, params, inputs, paths="w")))
    if program.materialised or program.name in LOOPS:
        with pytest.raises(ValueError, match=r"would be materialised|Reverse-mode"):
            record(params, inputs)
        return
    got = record(params, inputs)["w"]
    jax.jit(program.build(use))(params, inputs)
    jax.effects_barrier()
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in seen])
    sums = [_flat(a, n).sum(0) for a, n in ((got.second, 2), (got.total, 1), (got.rows, 0))]
    holds(jlora.Inputs(*sums), rows)
