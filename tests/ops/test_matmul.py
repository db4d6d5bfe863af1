"""The product that joins leading axes on one CPU device: values, derivatives, and the programs it leaves alone."""

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora._ops.matmul import rank_matmul
from tests.support import compiled as report
from tests.support.agreement import close

SHAPES = [
    ((2, 3, 4), (4, 5), ((2,), (0,))),
    ((4, 5), (2, 3, 5), ((1,), (2,))),
    ((2, 3, 4), (2, 3, 5), ((0, 1), (0, 1))),
    ((2, 3, 4, 5), (5, 4, 6), ((3, 2), (0, 1))),
    ((2, 3, 4, 5), (4, 5, 6), ((2, 3), (0, 1))),
    ((2, 3, 4), (3, 6), ((1,), (0,))),
    ((3,), (3,), ((0,), (0,))),
    ((2, 3), (4,), ((), ())),
]


@pytest.mark.drawn(3)
@pytest.mark.parametrize(("left", "right", "dims"), SHAPES)
def test_it_is_dot_general(left, right, dims):
    x, w = (jax.random.normal(jax.random.key(k), s) for k, s in enumerate((left, right)))

    def ours(x, w):
        return rank_matmul(x, w, dims, precision=None, dtype=jnp.dtype(jnp.float32))

    def plain(x, w):
        return lax.dot_general(x, w, (dims, ((), ())))

    def all_of(f):
        def loss(x, w):
            return jnp.sum(jnp.square(jnp.sin(f(x, w))))

        return (
            jax.jit(f)(x, w),
            f(x, w),
            jax.jit(jax.grad(loss, (0, 1)))(x, w),
            jax.jit(jax.hessian(loss, (0, 1)))(x, w),
            jax.jvp(f, (x, w), (w.sum() * x, x.sum() * w)),
            jax.vmap(f, (0, None))(jnp.stack([x, 2 * x]), w),
            jax.vmap(f, (None, 0))(x, jnp.stack([w, 2 * w])),
            jax.vmap(f)(jnp.stack([x, 2 * x]), jnp.stack([w, 2 * w])),
        )

    close(all_of(ours), all_of(plain), 1e-5)


@pytest.mark.parametrize(("left", "right", "dims"), [SHAPES[0], SHAPES[3]])
def test_mapped_products_are_mapped_dot_general(left, right, dims):
    """Both operands mapped, along axes that are not the first ones; one after the other; and once more over both."""
    x, w = (jax.random.normal(jax.random.key(k), (2, *s, 3)) for k, s in enumerate((left, right)))

    def all_of(product):
        def loss(x, w):
            return jnp.sum(jnp.square(jnp.sin(jax.vmap(jax.vmap(product), (-1, -1))(x, w))))

        x_then_w = jax.vmap(jax.vmap(product, (None, 0)), (0, None))(x[..., 0], w[..., 0])
        w_then_both = jax.vmap(jax.vmap(product, (None, -1)), (-1, 0), 1)(x[0, ..., :2], w)
        return jax.value_and_grad(loss, (0, 1))(x, w), x_then_w, w_then_both

    def ours(x, w):
        return rank_matmul(x, w, dims, precision=None, dtype=jnp.dtype(jnp.float32))

    def plain(x, w):
        return lax.dot_general(x, w, (dims, ((), ())))

    results = [jax.jit(lambda f=f: all_of(f))() for f in (ours, plain)]
    close(results[0], results[1], 1e-5)


def test_members_of_a_bank_store_an_activation_once():
    """The base product and the members' products read it in two shapes; one adapter on all rows needs as much."""
    members, shape, width, hidden = 4, (2, 16, 64), 64, 256
    params = {"up": jax.ShapeDtypeStruct((width, hidden), "f4"), "down": jax.ShapeDtypeStruct((hidden, width), "f4")}

    def f(p, x):
        return jax.nn.gelu(x @ p["up"]) @ p["down"]

    adapted, x = jlora.adapt(f), jax.ShapeDtypeStruct(shape, "f4")
    sites = jlora.trace(f, params, x)
    one = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, jlora.LoRA(rank=4)))
    many, rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((members, *a.shape), a.dtype), (one, x))

    def temporary(f, *args):
        return report.memory(jax.jit(f).lower(params, *args).compile()).temp_size_in_bytes

    joined = jax.ShapeDtypeStruct((members * shape[0], *shape[1:]), "f4")
    assert temporary(jax.vmap(adapted, (None, 0, 0)), many, rows) < 1.02 * temporary(adapted, one, joined)


def step():
    """The gradient of one adapted layer, and its abstract arguments."""
    params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
    x = jax.ShapeDtypeStruct((4, 6, 64), jnp.float32)

    def f(p, x):
        return jnp.tanh(x @ p["w"])

    sites = jlora.trace(f, params, x)
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, jlora.LoRA(rank=5)))

    def grad(params, adapter, x):
        return jax.grad(lambda a: jnp.sum(jlora.adapt(f)(params, a, x)))(adapter)

    return grad, (params, adapter, x)


def joined(text: str) -> bool:
    """Whether a lowered program joins batch and time, 4 x 6, into 24."""
    return "tensor<24x" in text


def test_a_program_for_one_cpu_joins_and_others_are_untouched():
    grad, args = step()
    traced = jax.jit(grad).trace(*args)
    assert joined(traced.lower(lowering_platforms=("cpu",)).as_text())
    assert not joined(traced.lower(lowering_platforms=("tpu",)).as_text())
    assert not joined(traced.lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_custom_primitive_is_bound_for_the_cpu_alone(platform, monkeypatch):
    """So jaxpr tools, `jax.export` and `jet` meet documented primitives alone on GPU and TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    grad, args = step()
    assert ("jlora_" in str(jax.make_jaxpr(grad)(*args))) == (platform == "cpu")


def test_no_sharded_axis_is_joined():
    grad, (params, adapter, x) = step()
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def on(spec, tree):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    lowered = jax.jit(grad).lower(on((), params), on((), adapter), on(("data", "seq"), x))
    assert not joined(lowered.as_text())
    assert "all-gather" not in report.text(lowered.compile())


def test_the_gradient_makes_no_copy_of_a_cotangent():
    """XLA's slow path copies the (out, batch * time) cotangent; the joined product needs no temporary of its size."""
    batch, time, width, rank = 4, 64, 256, 4
    x, b = jnp.ones((batch, time, rank)), jnp.ones((rank, width))
    g = jnp.ones((batch, time, width))

    def temporary(f):
        gradient = jax.jit(lambda x, b, g: jax.vjp(lambda b: f(x, b), b)[1](g))
        return report.memory(gradient.lower(x, b, g).compile())

    ours = temporary(lambda x, b: rank_matmul(x, b, ((2,), (0,)), precision=None, dtype=jnp.dtype(jnp.float32)))
    assert ours.temp_size_in_bytes < np.prod(g.shape) * 4 / 8


def test_products_for_gpus_are_not_joined():
    """The compiler for GPUs would join two products of the cotangent. Values and derivatives are those of the law."""
    keys = jax.random.split(jax.random.key(0), 3)
    params, x = {"w": jax.random.normal(keys[0], (6, 8))}, jax.random.normal(keys[1], (2, 4, 6))

    def f(params, x):
        return jnp.sin(x @ params["w"])

    adapter = jlora.init(keys[2], jlora.trace(f, params, x), {"w": jlora.LoRA(rank=3)})
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)

    def all_of(f):
        def loss(adapter, x):
            return jnp.sum(f(adapter, x) ** 2)

        def run(adapter, x):
            tangents = jax.jvp(f, (adapter, x), (adapter, x))
            mapped = jax.vmap(f, (None, 0))(adapter, x)
            return jax.grad(loss, (0, 1))(adapter, x), tangents, mapped

        return run

    adapted = all_of(lambda adapter, x: jlora.adapt(f)(params, adapter, x))
    with jax.default_device("gpu"):  # only traced
        program = jax.make_jaxpr(adapted)(adapter, x)
    assert "optimization_barrier" in str(program)
    assert "optimization_barrier" not in str(jax.make_jaxpr(adapted)(adapter, x))
    values = jax.jit(jax.extend.core.jaxpr_as_fun(program))(*jax.tree.leaves((adapter, x)))
    merged = all_of(lambda adapter, x: f(jlora.merge(params, adapter), x))
    close(values, jax.tree.leaves(jax.jit(merged)(adapter, x)), 1e-5)


def test_small_members_have_gradients():
    """A small batched product whose result is transposed: XLA's CPU backend aborts if that becomes a layout."""
    keys = jax.random.split(jax.random.key(0), 3)
    up, down, x = (jax.random.normal(k, shape) for k, shape in zip(keys, [(6, 10), (10, 4), (3, 6)], strict=True))
    params = {"up": up, "down": down}

    def fun(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    sites, method = jlora.trace(fun, params, x), jlora.LoRA(2, b_init=jax.nn.initializers.normal(1.0))
    members = jax.vmap(lambda key: jlora.init(key, sites, method))(keys)

    def gradient(run):
        return jax.jit(jax.vmap(jax.grad(lambda adapter: jnp.square(run(adapter)).sum())))(members)

    got = gradient(lambda adapter: jlora.adapt(fun)(params, adapter, x))
    want = gradient(lambda adapter: fun(jlora.merge(params, adapter), x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "turned"), [(64, True), (9, True), (8, False), (3, False)])
def test_a_gradient_is_turned_if_many_tokens_are_summed(tokens: int, turned: bool):
    """The gradient of a tall factor (16, 4). Few tokens are no reason to hand the optimiser a transposed gradient."""

    def gradient(x, g):
        return rank_matmul(x, g, ((0,), (0,)), precision=None, dtype=jnp.dtype(jnp.float32))

    x, g = jax.random.normal(jax.random.key(0), (tokens, 16)), jax.random.normal(jax.random.key(1), (tokens, 4))
    assert ("optimization_barrier" in jax.jit(gradient).lower(x, g).as_text()) == turned
    close(jax.jit(gradient)(x, g), np.asarray(x, np.float64).T @ np.asarray(g, np.float64), 1e-5)
