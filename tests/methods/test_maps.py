"""Maps of one side of a weight: applied to activations, undone by `unmerge`, and exact in what a program does to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import extend
from tests.support.agreement import F32, adapter_for, sides
from tests.support.draw import drawn

Array = jax.Array
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class Blocks(extend.Method):
    """Multiplies one side of a weight by trained blocks, which are no rotations."""

    block: int = extend.positive_integer(4)
    side: str = extend.choice("in", "out")

    initializers = {"m": jax.nn.initializers.normal()}  # noqa: RUF012
    is_multiplicative = True

    def factors_for(self, axes: extend.WeightAxes) -> dict[str, str]:
        return {"m": "*stack number block rows"}

    def sizes(self, axes: extend.WeightAxes) -> dict[str, int]:
        return {"number": axes.count(f"*{self.side}") // self.block, "rows": self.block}

    def lower(self, update: extend.Update, w: extend.AdaptedWeight) -> extend.AdaptedWeight:
        return extend.map_axes(w, update, update["m"], f"*{self.side}")


def array(*shape: int) -> Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    number, size, _ = blocks.shape
    full = np.zeros((number * size, number * size), np.float32)
    for k, block in enumerate(blocks):
        full[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    return full


# Of each program: the shapes of the weight and of the input, and whether maps of its in and of its out axes are applied
# to activations, so that no weight is dense.
PROGRAMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Array], str]] = {
    "product": ((8, 12), (3, 8), lambda w, x: x @ w, "in out"),
    "weight_left": ((12, 8), (8, 3), lambda w, x: w @ x, "in out"),
    "heads": ((8, 3, 4), (5, 8), lambda w, x: jnp.einsum("ti,iho->tho", x, w), "in out"),
    "reshaped": ((8, 3, 4), (5, 8), lambda w, x: x @ w.reshape(8, 12), "in out"),
    "split": ((8, 12), (5, 2, 4), lambda w, x: jnp.einsum("tab,abo->to", x, w.reshape(2, 4, 12)), "in out"),
    "layer_of_a_stack": ((3, 8, 12), (5, 8), lambda w, x: x @ w[1], "in out"),
    "layer_taken": ((3, 8, 12), (5, 8), lambda w, x: x @ jnp.take(w, jnp.int32(1), axis=0, mode="clip"), "in out"),
    "columns": ((8, 12), (5, 8), lambda w, x: x @ w[:, 3:9], "in"),
    "rows": ((16, 12), (5, 8), lambda w, x: x @ w[4:12], "out"),
    "scaled_columns": ((8, 12), (5, 8), lambda w, x: x @ (w * jnp.arange(12.0)[None]), "in"),
    "scaled_rows": ((8, 12), (5, 8), lambda w, x: x @ (w * jnp.arange(8.0)[:, None]), "out"),
    "reversed_rows": ((8, 12), (5, 8), lambda w, x: x @ w[::-1], ""),
    "rolled": ((8, 12), (5, 8), lambda w, x: x @ jnp.roll(w, 3, 0), ""),
    "concatenated": ((8, 12), (5, 8), lambda w, x: x @ jnp.concatenate([w, 2 * w], 1), ""),
    "lookup": ((8, 12), (3, 12), lambda w, x: w[jnp.array([1, 7, 1])] * x, "out"),
    "lookup_out_of_bounds": ((8, 12), (2, 12), lambda w, x: w.at[jnp.array([1, 9])].get(mode="fill")[:1] * x, "out"),
    "tied": ((8, 12), (3, 12), lambda w, x: (x + w[jnp.array([1, 7, 1])]) @ w.T, "out"),
    "conv_1x1": ((1, 1, 8, 12), (2, 5, 5, 8), lambda w, x: conv(x, w), "in out"),
    "conv": ((2, 2, 8, 12), (2, 5, 5, 8), lambda w, x: conv(x, w), "out"),
    "conv_of_groups_that_blocks_join": ((1, 1, 4, 4), (2, 5, 5, 8), lambda w, x: conv(x, w, 2), "in"),
    "conv_in_groups": ((1, 1, 4, 12), (2, 5, 5, 8), lambda w, x: conv(x, w, 2), "in"),
    "experts": ((3, 8, 12), (7, 8), lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([2, 1, 3])), "in out"),
}  # fmt: skip


def conv(x: Array, w: Array, groups: int = 1) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


CASES = [
    pytest.param(name, side, marks=[] if drawn("maps", name, side, one_in=12) else [pytest.mark.nightly])
    for name in PROGRAMS
    for side in ("in", "out")
]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_programs(name, side):
    """Values and gradients of the merged weight; factored if the program lets maps act on activations."""
    shape, x_shape, use, factored = PROGRAMS[name]
    params, x = {"w": array(*shape)}, array(*x_shape)
    sites = jlora.trace(lambda params, x: use(params["w"], x), params, x)
    adapter = adapter_for(sites, {"w": Blocks(4, side)}, RNG)
    assert_law(lambda params, x: use(params["w"], x), params, adapter, x, is_factored=side in factored.split())


def assert_law(f: Any, params: Any, adapter: Any, x: Array, *, is_factored: bool | None = None) -> None:
    adapted, merged = sides(f, params, adapter, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=F32 * float(jnp.abs(b).max())), adapted, merged)
    if is_factored is not None:
        uses = jlora.explain(f, params, adapter, x).uses
        assert all(use.factored for use in uses) == is_factored
        assert not is_factored or any(use.form.startswith("map of the ") for use in uses)


@pytest.mark.parametrize("side", ["in", pytest.param("out", marks=pytest.mark.nightly)])
def test_values(side):
    """Against block-diagonal matrices in NumPy, also with a LoRA before the map."""
    params, x = {"w": array(8, 12)}, array(3, 8)
    sites = jlora.trace(lambda params, x: x @ params["w"], params, x)
    rng = np.random.default_rng(369)  # of its own: the condition number of a block of the in side is 1,171
    lora, blocks = adapter_for(sites, jlora.LoRA(2), rng), adapter_for(sites, Blocks(4, side), rng)
    moved = np.asarray(params["w"] + lora["w"]["a"] @ lora["w"]["b"])
    matrix = block_diagonal(np.asarray(blocks["w"]["m"]))
    want = matrix @ moved if side == "in" else moved @ matrix.T
    np.testing.assert_allclose(jlora.merge(params, [lora, blocks])["w"], want, rtol=2e-5, atol=2e-5)
    assert_law(lambda params, x: x @ params["w"], params, [lora, blocks], x, is_factored=True)
    restored = jlora.unmerge(jlora.merge(params, [lora, blocks]), [lora, blocks])["w"]
    np.testing.assert_allclose(restored, params["w"], atol=2e-4)


def test_a_block_without_an_inverse_becomes_nan():
    params = {"w": array(8, 12)}
    sites = jlora.trace(lambda params, x: x @ params["w"], params, array(3, 8))
    blocks = adapter_for(sites, Blocks(4), np.random.default_rng(0))
    m = blocks["w"]["m"].at[1, 0].set(blocks["w"]["m"][1, 1])  # two equal rows
    blocks = {"w": dataclasses.replace(blocks["w"], factors={"m": m})}
    restored = jlora.unmerge(jlora.merge(params, blocks), blocks)["w"]
    np.testing.assert_allclose(restored[:4], params["w"][:4], atol=2e-4)
    assert np.isnan(restored[4:]).all()


def test_a_batch_axis_that_is_mapped():
    """A second use may batch the mapped axis: there a sum over it is no sum of results, and the weight is dense."""
    params, x = {"w": array(8, 12)}, array(3, 8)

    def f(params, x):
        return jnp.einsum("ti,io->ito", x, params["w"]).sum(0) + x @ params["w"]

    sites = jlora.trace(lambda params, x: x @ params["w"], params, x)
    for side in ("in", "out"):
        adapter = adapter_for(sites, Blocks(4, side), RNG)
        assert_law(f, params, adapter, x, is_factored=side == "out")


@pytest.mark.nightly
def test_blocks_that_end_within_an_axis():
    """Rows (3, 4) in blocks of 6 are one block; the law and `unmerge` hold."""
    params, x = {"w": array(3, 4, 5)}, array(2, 3, 4)

    def f(params, x):
        return jnp.einsum("tab,abo->to", x, params["w"])

    adapter = adapter_for(jlora.trace(f, params, x), jlora.OFT(6), RNG)
    assert_law(f, params, adapter, x)
    np.testing.assert_allclose(jlora.unmerge(jlora.merge(params, adapter), adapter)["w"], params["w"], atol=1e-5)


def test_a_row_out_of_bounds_gives_matrices_no_gradient():
    """`jnp.take` fills rows out of bounds by NaN, which reach neither the other rows nor the blocks."""
    params, ids = {"w": array(8, 12)}, jnp.array([1, 9])

    def f(params, ids):
        return jnp.take(params["w"], ids, axis=0)

    adapter = adapter_for(jlora.trace(f, params, ids), {"w": Blocks(4, "out")}, RNG)
    y, pull = jax.vjp(lambda adapter: jlora.adapt(f)(params, adapter, ids), adapter)
    assert jnp.isnan(y[1]).all()
    assert not jnp.isnan(y[0]).any()
    assert not jnp.isnan(pull(jnp.ones_like(y).at[1].set(0))[0]["w"]["m"]).any()


def test_the_weight_is_never_rotated():
    """The compiled step of one kernel has no temporary of its size, with a plain and with a 4-bit base."""
    params, x = {"w": array(256, 256)}, array(16, 256)

    def f(params, x):
        return x @ params["w"]

    sites = jlora.trace(f, params, x)
    adapter = adapter_for(sites, jlora.OFT(16), RNG)

    def gradient(adapter, params, x):
        return jax.grad(lambda adapter: jlora.adapt(f)(params, adapter, x).sum())(adapter)

    text = jax.jit(gradient).lower(adapter, params, x).compile().as_text()
    assert text is not None
    body = text[text.index("ENTRY") :]
    lines = [line for line in body.splitlines() if "= f32[256,256]" in line]
    assert lines
    assert all(" parameter(" in line or " copy(" in line for line in lines)
    quantised = jlora.quantize(params, sites, {"w": "nf4"})
    assert not jlora.explain(f, quantised, adapter, x).dense
    got, want = (jlora.adapt(f)(quantised, adapter, x), f(jlora.merge(quantised, adapter), x))
    np.testing.assert_allclose(got, want, atol=1e-4)
