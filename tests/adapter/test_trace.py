"""What `trace` and `explain` say, and how they show it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model


def test_sites_say_all_of_a_weight():
    sites = toy_model.sites()
    assert list(sites) == ["embed", "layers/bias", "layers/down", "layers/up", "mix/bias", "mix/kernel"]
    up = sites["layers/up"]
    assert up.shape == (3, 8, 12)
    assert up.dtype == jnp.float32
    assert up.roles == ("stack", "in", "out")
    assert [use.primitive for use in up.uses] == ["dot_general"]
    assert up.flops == 3 * 2 * 10 * 8 * 12
    assert sites["embed"].is_lookup
    assert sites["embed"].is_product
    assert [use.primitive for use in sites["embed"].uses] == ["gather", "dot_general"]
    assert sites["mix/bias"].unsupported_reason == "no product, convolution or lookup uses it (only add)"
    assert sites.flops == sum(site.flops for site in sites.values())


def test_explain_counts_what_the_adapter_adds():
    params, adapter = toy_model.params(), toy_model.adapter()
    explained = jlora.explain(toy_model.model, params, adapter, toy_model.tokens())
    assert explained.dense == ()
    up = next(use for use in explained.uses if use.path == "layers/up")
    assert up.added == 3 * 2 * 10 * 2 * (8 + 12)
    assert "toy_model.py" in up.where
    assert "0 dense" in str(explained).splitlines()[-1]


def test_a_weight_that_is_handed_out_is_formed_there_alone():
    params = {"w": jnp.ones((4, 3))}

    def f(p, x):
        return x @ p["w"], p["w"].T

    x = jnp.ones((2, 4))
    sites = jlora.trace(f, params, x)
    assert [use.primitive for use in sites["w"].uses] == ["dot_general", "output"]
    adapter = toy_model.random_adapter(sites, jlora.LoRA(rank=1, dropout=0.5))
    explained = jlora.explain(f, params, adapter, x)
    assert [(use.primitive, use.bytes) for use in explained.dense] == [("output", 4 * 3 * 4)]
    with pytest.warns(jlora.DenseWarning, match="w: the program's output"):
        y, w = jlora.adapt(f)(params, jlora.with_dropout(adapter, jax.random.key(1)), x)
    np.testing.assert_array_equal(w.T, jlora.merge(params, adapter)["w"])
    assert not np.allclose(y, x @ w.T)  # the product alone drops its input
    with pytest.raises(jlora.DenseError, match="w: the program's output"):
        jlora.adapt(f, on_dense="error")(params, adapter, x)


def test_abstract_parameters_give_the_same_sites():
    shapes = jax.eval_shape(toy_model.params)
    sites = jlora.trace(toy_model.model, shapes, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert str(sites) == str(toy_model.sites())


def test_a_branch_and_a_loop_count_as_often_as_they_run():
    params = {"w": jnp.ones((4, 4))}

    def f(p, x):
        x = jax.lax.fori_loop(0, 5, lambda _, x: x @ p["w"], x)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x)

    sites = jlora.trace(f, params, jnp.ones((2, 4)))
    assert sites["w"].flops == 6 * 2 * 2 * 4 * 4 == sites.flops


def test_flops_of_symbolic_sizes():
    """An expression of the sizes. A share is shown if it is the same for all sizes."""
    batch, length = jax.export.symbolic_shape("b, s")
    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 2)), "bias": jnp.ones(2)}

    def f(p, x):
        return x @ p["up"] @ p["down"] + p["bias"][None, None]

    x = jax.ShapeDtypeStruct((batch, length, 4), jnp.float32)
    sites = jlora.trace(f, params, x)
    assert sites["up"].flops == 2 * 4 * 6 * batch * length
    assert sites.flops == 2 * (4 * 6 + 6 * 2) * batch * length
    rows = {line.split()[0]: line for line in str(sites).splitlines()}
    assert "66.7%" in rows["up"]
    assert "33.3%" in rows["down"]
    assert "72*b*s FLOPs" in str(sites)
    adapter = jlora.init(jax.random.key(0), sites, {"up": jlora.LoRA(1)})
    explanation = jlora.explain(f, params, adapter, x)
    assert explanation.uses[0].added == 2 * (4 + 6) * batch * length
    assert "20*b*s FLOPs (27.78% of the base's 72*b*s)" in str(explanation)

    def g(p, x):
        return jnp.einsum("bsi,bti->bst", f(p, x), f(p, x))

    rows = {line.split()[0]: line for line in str(jlora.trace(g, params, x)).splitlines()}
    assert "unknown" in rows["up"]


def test_shardings_are_kept():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    w = jax.device_put(np.ones((8, 4), np.float32), sharding)
    sites = jlora.trace(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 8)))
    assert sites["w"].sharding == sharding


def test_arguments_that_are_no_arrays_pass_through():
    params = {"w": jnp.ones((4, 4))}

    def f(p, x, n, *, train, name=None, options=()):
        assert isinstance(n, int)
        assert train is True
        y = x
        for _ in range(n):
            y = y @ p["w"]
        return {"y": y, "name": name, "options": options, "n": n}

    adapter = toy_model.nonzero(
        jlora.init(jax.random.key(0), jlora.trace(f, params, jnp.ones((2, 4)), 2, train=True), {"w": jlora.LoRA(2)})
    )
    out = jlora.adapt(f)(params, adapter, jnp.ones((2, 4)), 2, train=True, name="left", options=("a", 1))
    assert (out["name"], out["options"], out["n"]) == ("left", ("a", 1), 2)
    assert jlora.adapt(f).__name__ == "f"


def test_uses_in_a_loop_that_is_traced_again_are_those_of_the_last_trace():
    """The loop squares the weight that it carries: what each step consumes is an array, not the factored weight."""
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))

    def f(p, x):
        def body(carry, _):
            w, y = carry
            return (w * w, y @ w), None

        return x @ p["w"], jax.lax.scan(body, (p["w"], x), length=2)[0][1]

    adapter = jlora.init(jax.random.key(0), jlora.trace(f, params, x), {"w": jlora.LoRA(2)})
    uses = jlora.explain(f, params, adapter, x).uses
    assert [(use.primitive, use.factored) for use in uses] == [("dot_general", True), ("scan", False)]


@pytest.mark.parametrize(
    ("method", "dtype", "added"),
    [
        (jlora.LoRA(2), jnp.float32, 2 * 3 * 5 * (8 * 2 + 2 * 16)),  # the batch axis of the factors is that of x
        (jlora.SharedLoRA(2), jnp.float32, 2 * 3 * 5 * (8 * 2 + 2 * 16)),  # one factor has no such axis
        (jlora.OFT(4), jnp.float32, 2 * 3 * 5 * 2 * 4 * 4),  # two blocks of 4 x 4
        (jlora.LoKr(2), jnp.float32, 2 * 3 * 5 * (2 * 4 * 4 + 2 * 4 * 4)),  # x (2, 4) with (4, 4), then with (2, 4)
        (jlora.SHiRA(1), jnp.bfloat16, 2 * 3 * 5 * (8 + 16)),  # 24 entries, beside the base
    ],
    ids=str,
)
def test_added_flops_are_those_of_the_products(method: jlora.Method, dtype: Any, added: int):
    params, x = {"w": jnp.ones((3, 8, 16), dtype)}, jnp.ones((3, 5, 8), dtype)

    def f(params: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("bti,bio->bto", x, params["w"])

    adapter = jlora.init(jax.random.key(0), jlora.trace(f, params, x), method)
    (use,) = jlora.explain(f, params, adapter, x).uses
    assert use.added == added


def test_added_flops_of_experts_are_those_of_one_expert_for_each_row():
    params, x, sizes = {"w": jnp.ones((3, 8, 16))}, jnp.ones((5, 8)), jnp.array([1, 2, 2])

    def f(params: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, params["w"], sizes)

    adapter = jlora.init(jax.random.key(0), jlora.trace(f, params, x, sizes), jlora.LoRA(2))
    (use,) = jlora.explain(f, params, adapter, x, sizes).uses
    assert use.added == 2 * 5 * (8 * 2 + 2 * 16)


@pytest.mark.parametrize(
    ("method", "added", "dense_bytes"),
    [
        (jlora.LoRA(2), 2 * 15 * 2 * 16, 0),
        (jlora.LoHa(2), 2 * 15 * (2 * 2) * 16, 0),
        (jlora.Full(), 0, 0),
        (jlora.RandLoRA(2), 2 * 30 * 16 * 16, 30 * 16 * 4),
        (jlora.SHiRA(2), 0, 30 * 16 * 4),
    ],
    ids=str,
)
def test_added_flops_and_dense_bytes_of_a_lookup(method: jlora.Method, added: int, dense_bytes: int):
    params, ids = {"w": jnp.ones((30, 16))}, jnp.zeros((3, 5), int)

    def f(params: Any, ids: jax.Array) -> jax.Array:
        return params["w"][ids]

    adapter = jlora.init(jax.random.key(0), jlora.trace(f, params, ids), {"w": method})
    (use,) = jlora.explain(f, params, adapter, ids).uses
    assert (use.added, use.bytes, use.factored) == (added, dense_bytes, not dense_bytes)
