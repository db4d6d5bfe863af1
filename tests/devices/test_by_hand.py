"""Programs that are divided over eight devices by hand, adapted against merged: values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from tests.support import toy_model

Tree = Any
VOCABULARY, WIDTH, HIDDEN, EXPERTS, ROWS = 64, 16, 24, 8, 32


def mesh_of(**axes: int) -> Any:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / shape[-2] ** 0.5


def law(fun: Any, plain: Any, params: Tree, x: jax.Array) -> None:
    """The adapted program is the merged program of one device."""
    adapter = toy_model.random_adapter(jlora.trace(plain, params, x), jlora.LoRA(3))
    assert set(jlora.trace(fun, params, x)) == set(adapter)

    def step(fun: Any) -> Any:
        loss = lambda adapter: jnp.square(fun(params, adapter, x)).mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(adapter)

    actual = step(jlora.adapt(fun, on_dense="error"))
    expected = step(lambda p, adapter, x: plain(jlora.merge(p, adapter), x))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_table_that_is_divided_by_rows_and_tied_to_the_head(check_vma: bool) -> None:
    """Each device looks up the tokens that it holds, and computes the logits of these tokens."""
    params = {"embed": normal(0, VOCABULARY, WIDTH)}
    tokens = jnp.arange(ROWS) * 7 % VOCABULARY

    def body(p: Tree, tokens: jax.Array) -> jax.Array:
        size = p["embed"].shape[0]
        at = tokens - lax.axis_index("v") * size
        rows = p["embed"][jnp.clip(at, 0, size - 1)]
        x = lax.psum(jnp.where(((at >= 0) & (at < size))[:, None], rows, 0), "v")
        return jnp.tanh(x) @ p["embed"].T

    specs = {"mesh": mesh_of(d=2, v=4), "in_specs": ({"embed": P("v")}, P("d")), "out_specs": P("d", "v")}
    fun = jax.shard_map(body, **specs, check_vma=check_vma)
    law(fun, lambda p, tokens: jnp.tanh(p["embed"][tokens]) @ p["embed"].T, params, tokens)


def test_weights_gathered_and_sums_scattered_on_three_axes() -> None:
    """Fully sharded by hand: weights are gathered along `f`, activations summed in pieces along `m`."""
    params = {"up": normal(0, WIDTH, HIDDEN), "down": normal(1, HIDDEN, WIDTH)}

    def body(p: Tree, x: jax.Array) -> jax.Array:
        up = lax.all_gather(p["up"], "f", axis=0, tiled=True)
        down = lax.all_gather(p["down"], "f", axis=1, tiled=True)
        x = lax.all_gather(x, "m", axis=1, tiled=True)
        return lax.psum_scatter(jnp.tanh(x @ up) @ down, "m", scatter_dimension=1, tiled=True)

    fun = jax.shard_map(
        body,
        mesh=mesh_of(d=2, f=2, m=2),
        in_specs=({"up": P("f", "m"), "down": P("m", "f")}, P(("d", "f"), "m")),
        out_specs=P(("d", "f"), "m"),
    )
    law(fun, lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, normal(2, ROWS, WIDTH))


def test_ragged_experts_on_an_axis_of_experts() -> None:
    """Each of four devices has two experts, and the rows of these."""
    params = {"up": normal(0, EXPERTS, WIDTH, HIDDEN), "down": normal(1, EXPERTS, HIDDEN, WIDTH)}
    x = normal(2, ROWS, WIDTH)
    sizes = jnp.asarray([3, 5, 8, 0, 1, 7, 4, 4], jnp.int32)  # eight rows for each device

    def experts(p: Tree, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)

    mapped = jax.shard_map(experts, mesh=mesh_of(e=4, m=2), in_specs=(P("e"), P("e"), P("e")), out_specs=P("e"))
    law(lambda p, x: mapped(p, x, sizes), lambda p, x: experts(p, x, sizes), params, x)


def test_a_stack_in_stages_that_scan() -> None:
    """Each of eight stages scans over its two layers and hands its result on."""
    params = {"w": normal(0, 16, WIDTH, WIDTH)}

    def body(p: Tree, x: jax.Array) -> jax.Array:
        x = lax.pcast(x, "s", to="varying")
        for _ in range(8):
            x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
            x = lax.ppermute(x, "s", [(k, (k + 1) % 8) for k in range(8)])
        return lax.psum(jnp.where(lax.axis_index("s") == 0, x, 0), "s")

    fun = jax.shard_map(body, mesh=mesh_of(s=8), in_specs=(P("s"), P()), out_specs=P())
    plain = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    law(fun, plain, params, normal(2, ROWS, WIDTH))
