"""LoRA's own values: starts, scales and ranks, against closed formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.agreement import close


def one(method, w, f=lambda p, x: x @ p["w"], x=None, **options):
    """An adapter of one weight, and the update it holds."""
    x = jnp.ones((3, w.shape[0]), w.dtype) if x is None else x
    sites = jlora.trace(f, {"w": w}, x)
    adapter = jlora.init(jax.random.key(0), sites, {"w": method}, **options)
    return adapter, adapter["w"]


def test_the_default_start_is_kaiming_uniform_and_zero():
    _, update = one(jlora.LoRA(rank=64), jnp.ones((256, 512)))
    a, b = np.asarray(update.factors["a"]), np.asarray(update.factors["b"])
    bound = 1 / np.sqrt(256)  # a = sqrt(5): gain sqrt(2 / (1 + 5)), times sqrt(3 / in)
    assert a.shape == (256, 64)
    assert b.shape == (64, 512)
    assert not b.any()
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.999 * bound
    assert abs(a.std() - bound / np.sqrt(3)) < 0.01 * bound
    assert abs(a.mean()) < 0.01 * bound


def test_an_embedding_starts_with_zero_and_normal():
    table = jnp.ones((500, 64))
    _, update = one(jlora.LoRA(rank=16), table, lambda p, ids: p["w"][ids], jnp.arange(3))
    a, b = np.asarray(update.factors["a"]), np.asarray(update.factors["b"])
    assert a.shape == (500, 16)
    assert not a.any()
    assert abs(b.std() - 1) < 0.1


def test_initialisers_can_be_replaced():
    ones, half = jax.nn.initializers.ones, jax.nn.initializers.constant(0.5)
    _, update = one(jlora.LoRA(rank=3, a_init=ones, b_init=half), jnp.ones((5, 7)))
    assert np.array_equal(update.factors["a"], np.ones((5, 3)))
    assert np.array_equal(update.factors["b"], np.full((3, 7), 0.5))
    assert update.method == jlora.LoRA(rank=3)  # what only the start needs is not kept


def test_two_initialisers_start_at_the_base_with_an_offset_alone():
    normal = jax.nn.initializers.normal(1.0)
    params, ids = toy_model.params(), toy_model.tokens()
    base = toy_model.model(params, ids)
    for offset in (True, False):
        method = jlora.LoRA(2, a_init=normal, b_init=normal, offset=offset)
        adapter = jlora.init(jax.random.key(0), toy_model.sites(), {"mix/kernel": method})
        change = np.abs(np.asarray(jlora.adapt(toy_model.model)(params, adapter, ids) - base)).max()
        assert change < 1e-6 if offset else change > 1e-2


def test_an_initialiser_sees_one_layer_of_a_stack():
    shapes = []

    def spy(key, shape, dtype=jnp.float32, out_sharding=None):
        shapes.append(shape)
        return jnp.zeros(shape, dtype)

    made = jlora.init(jax.random.key(0), toy_model.sites(), {"layers/up": jlora.LoRA(rank=2, a_init=spy, b_init=spy)})
    assert shapes == [(toy_model.WIDTH, 2), (2, toy_model.HIDDEN)]
    assert made["layers/up"].factors["a"].shape == (toy_model.LAYERS, toy_model.WIDTH, 2)


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (jlora.LoRA(rank=4), 1.0),
        (jlora.LoRA(rank=4, alpha=8.0), 2.0),
        (jlora.LoRA(rank=4, alpha=8.0, rank_stabilized=True), 4.0),
        (jlora.LoRA(rank=4, rank_stabilized=True), 1.0),
    ],
)
def test_scale(method, scale):
    w = jax.random.normal(jax.random.key(1), (6, 5))
    adapter, _ = one(method, w)
    adapter = toy_model.nonzero(adapter)
    factors = adapter["w"].factors
    close(jlora.merge({"w": w}, adapter)["w"], w + scale * factors["a"] @ factors["b"])


def test_axes_follow_the_use():
    adapter = toy_model.adapter(jlora.LoRA(rank=2))
    shapes = {path: (u.factors["a"].shape, u.factors["b"].shape) for path, u in adapter.items()}
    assert shapes == {
        "embed": ((11, 2), (2, 8)),
        "layers/down": ((3, 12, 2), (3, 2, 8)),
        "layers/up": ((3, 8, 2), (3, 2, 12)),
        "mix/kernel": ((8, 2), (2, 8)),
    }


def test_factors_are_float32_by_default_and_of_any_dtype_by_name():
    w = jnp.ones((4, 4), jnp.bfloat16)
    assert one(jlora.LoRA(rank=2), w)[1].factors["a"].dtype == jnp.float32
    assert one(jlora.LoRA(rank=2), w, dtype=jnp.bfloat16)[1].factors["a"].dtype == jnp.bfloat16


def test_init_under_jit_and_eval_shape():
    sites, method = toy_model.sites(), jlora.LoRA(rank=2)
    eager = jlora.init(jax.random.key(0), sites, method)
    jitted = jax.jit(lambda key: jlora.init(key, sites, method))(jax.random.key(0))
    abstract = jax.eval_shape(lambda key: jlora.init(key, sites, method), jax.random.key(0))
    assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(abstract)
    close(jitted, eager, 1e-6)


def test_a_huge_model_is_adapted_without_allocating_it():
    size = 2**17
    params = {"w": jax.ShapeDtypeStruct((size, size), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((8, size), jnp.bfloat16)
    sites = jlora.trace(lambda p, x: x @ p["w"], params, x)
    adapter = jax.eval_shape(lambda key: jlora.init(key, sites, jlora.LoRA(rank=8)), jax.random.key(0))
    explained = jlora.explain(lambda p, x: x @ p["w"], params, adapter, x)
    assert explained.dense == ()
    assert explained.uses[0].flops == 2 * 8 * size**2
    assert explained.uses[0].added == 2 * 8 * 2 * size * 8
    out = jax.eval_shape(jlora.adapt(lambda p, x: x @ p["w"]), params, adapter, x)
    assert out.shape == (8, size)
    assert out.dtype == jnp.bfloat16


def test_the_order_of_patterns_decides():
    big, little = jlora.LoRA(rank=4), jlora.LoRA(rank=2)
    adapter = jlora.init(
        jax.random.key(0),
        toy_model.sites(),
        {"layers/down": None, "layers/up": little, ".*bias": jlora.Full(), ".*": big},
    )
    assert "layers/down" not in adapter
    assert adapter["layers/up"].method == little
    assert adapter["mix/kernel"].method == big
    assert adapter["mix/bias"].method == jlora.Full()


def test_full_trains_whatever_the_program_uses():
    params = toy_model.params()
    adapter = toy_model.random_adapter(toy_model.sites(), {".*": jlora.Full()})
    apply = jax.jit(jlora.adapt(toy_model.model, on_dense="error"))
    close(apply(params, adapter, toy_model.tokens()), toy_model.model(jlora.merge(params, adapter), toy_model.tokens()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-8])
def test_narrow_factors_lose_nothing_in_a_wide_program(dtype, scale):
    """Neither to the method's scale, nor to what the program multiplies the weight by."""

    def model(params, x):
        return x @ (params["w"] * jnp.float32(scale))

    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in ((32, 48), (8, 32)))
    method = jlora.LoRA(rank=10, alpha=16.0, rank_stabilized=True)
    adapter = toy_model.nonzero(one(method, w, model, x, dtype=dtype)[0])
    assert adapter["w"].factors["a"].dtype == dtype
    update = model(jlora.merge({"w": w}, adapter), x) - model({"w": w}, x)
    got = jlora.adapt(model, on_dense="error")({"w": w}, adapter, x) - model({"w": w}, x)
    assert jnp.abs(got - update).max() < 1e-4 * jnp.abs(update).max()
