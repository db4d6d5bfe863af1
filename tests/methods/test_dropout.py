"""Dropout of the low-rank branch: pure, on the branch alone, and drawn apart for every use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.vera import shared_matrices
from tests.support import toy_model
from tests.support.agreement import close


def probe(f, params, x, rate=0.5):
    """The branch alone: A all ones, B the identity's first column, and a base of zeros."""
    sites = jlora.trace(f, params, x)
    return jlora.init(
        jax.random.key(0),
        sites,
        jlora.LoRA(rank=1, dropout=rate, a_init=jax.nn.initializers.ones, b_init=jax.nn.initializers.ones),
    )


def product(p, x):
    return x @ p["w"]


def test_the_branch_sees_a_dropped_input_and_the_base_does_not():
    w = jax.random.normal(jax.random.key(0), (64, 4))
    x = jnp.eye(64)
    adapter = probe(product, {"w": w}, x, 0.25)
    keyed = jlora.with_dropout(adapter, jax.random.key(1))
    branch = np.asarray(jlora.adapt(product)({"w": w}, keyed, x) - x @ w)[:, 0]
    kept = branch > 0.5
    np.testing.assert_allclose(branch[kept], 1 / 0.75, rtol=1e-5)
    np.testing.assert_allclose(branch[~kept], 0, atol=1e-5)
    assert 0.55 < kept.mean() < 0.92


def test_without_keys_nothing_is_dropped():
    params, adapter = toy_model.params(), toy_model.adapter(jlora.LoRA(rank=2, dropout=0.5))
    merged = jlora.merge(params, jlora.with_dropout(adapter, jax.random.key(0)))
    close(
        jlora.adapt(toy_model.model)(params, adapter, toy_model.tokens()), toy_model.model(merged, toy_model.tokens())
    )


def test_the_same_key_gives_the_same_masks_and_another_gives_others():
    params, adapter = toy_model.params(), toy_model.adapter(jlora.LoRA(rank=2, dropout=0.5))
    run = jax.jit(
        lambda key: jlora.adapt(toy_model.model)(params, jlora.with_dropout(adapter, key), toy_model.tokens())
    )
    assert np.array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))
    assert np.array_equal(run(jax.random.key(1)), run(jax.random.PRNGKey(1)))


def test_gradients_are_legal_inside_the_loss():
    params, adapter = toy_model.params(), toy_model.adapter(jlora.LoRA(rank=2, dropout=0.5))

    def loss(adapter, key):
        return toy_model.loss(
            jlora.adapt(toy_model.model)(params, jlora.with_dropout(adapter, key), toy_model.tokens())
        )

    grads = jax.jit(jax.grad(loss))(adapter, jax.random.key(0))
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("loop", ["scan over layers", "scan over time", "fori_loop", "while_loop", "twice", "experts"])
def test_every_use_draws_a_mask_of_its_own(loop):
    n, width = 4, 32
    x = jnp.ones((1, width))
    shape = (n, width, 1) if loop in ("scan over layers", "experts") else (width, 1)

    def one(w):
        return (x @ w)[0, 0]

    def while_loop(p):
        def body(state):
            k, out = state
            return k + 1, out.at[k].set(one(p["w"]))

        return jax.lax.while_loop(lambda s: s[0] < n, body, (0, jnp.zeros(n)))[1]

    programs = {
        "scan over layers": lambda p, _: jax.lax.scan(lambda c, w: (c, one(w)), 0, p["w"])[1],
        "scan over time": lambda p, _: jax.lax.scan(lambda c, _: (c, one(p["w"])), 0, None, length=n)[1],
        "fori_loop": lambda p, _: jax.lax.fori_loop(0, n, lambda k, out: out.at[k].set(one(p["w"])), jnp.zeros(n)),
        "while_loop": lambda p, _: while_loop(p),
        "twice": lambda p, _: jnp.stack([one(p["w"]) for _ in range(n)]),
        "experts": lambda p, _: jnp.einsum("ebi,eio->eo", jnp.ones((n, 1, width)), p["w"])[:, 0],
    }
    f, params = programs[loop], {"w": jnp.zeros(shape)}
    if loop == "experts":
        f = lambda p, _: jnp.einsum("ebi,eio->ebo", jnp.ones((n, 1, width)), p["w"])[:, 0, 0]  # noqa: E731
    adapter = jlora.with_dropout(probe(f, params, 0.0), jax.random.key(3))
    seen = np.asarray(jax.jit(jlora.adapt(f))(params, adapter, 0.0))
    # Each is twice the number of kept inputs: with masks drawn apart they are not all the same.
    assert seen.shape == (n,)
    assert len(np.unique(seen)) > 1
    assert ((seen > 0) & (seen < 2 * width)).all()


def test_a_stacked_weight_has_a_key_a_layer():
    keyed = jlora.with_dropout(toy_model.adapter(jlora.LoRA(rank=2, dropout=0.5)), jax.random.key(0))
    assert keyed["layers/up"].key.shape == (toy_model.LAYERS,)
    assert keyed["mix/kernel"].key.shape == ()
    data = [np.asarray(jax.random.key_data(u.key)).reshape(-1, 2) for u in keyed.values()]
    rows = np.concatenate(data)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_dropout_where_the_weight_is_formed_is_refused():
    f = lambda p, x: x @ jnp.tanh(p["w"]) + x @ p["w"]  # noqa: E731
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    adapter = jlora.with_dropout(probe(f, params, x), jax.random.key(0))
    with pytest.raises(ValueError, match=r"Dropout acts on the input of the low-rank branch.*w: tanh"):
        jlora.adapt(f)(params, adapter, x)


def test_convolutions_and_dropout():
    params, x = {"w": jnp.zeros((3, 3, 2, 1))}, jnp.ones((1, 8, 8, 2))

    def f(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    adapter = jlora.with_dropout(probe(f, params, x), jax.random.key(0))
    y = np.asarray(jlora.adapt(f)(params, adapter, x))
    assert len(np.unique(y)) > 3
    assert 0.7 * 18 < y.mean() < 1.3 * 18


def test_remat_draws_the_same_masks_again():
    params, adapter = toy_model.params(), toy_model.adapter(jlora.LoRA(rank=2, dropout=0.5))

    def value(f):
        def loss(adapter):
            return toy_model.loss(
                jlora.adapt(f)(params, jlora.with_dropout(adapter, jax.random.key(0)), toy_model.tokens())
            )

        return jax.jit(jax.value_and_grad(loss))(adapter)

    close(value(jax.checkpoint(toy_model.model)), value(toy_model.model))


@pytest.mark.parametrize("method", [jlora.MonteCLoRA(2, samples=3, sample_scale=0.5), jlora.PVeRA(5)], ids=repr)
def test_a_latent_update_is_drawn_with_a_key_and_at_its_mean_without(method):
    """In expectation the draws are the mean: PVeRA's noise is added to it, MonteCLoRA's to A."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 4), (3, 6)))
    adapter = jlora.init(jax.random.key(0), jlora.trace(lambda w, x: x @ w, w, x), {"": method})
    adapter = jax.tree.map(lambda a: a + 0.2, adapter)

    def run(key):
        return jlora.adapt(lambda w, x: x @ w)(w, jlora.with_dropout(adapter, key), x)

    draws = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 2000)))
    mean = np.asarray(jlora.adapt(lambda w, x: x @ w)(w, adapter, x))
    np.testing.assert_allclose(mean, x @ jlora.merge(w, adapter), atol=1e-5)
    deviation = draws.std(0)
    assert (deviation > 1e-3).all()
    assert (np.abs(draws.mean(0) - mean) < 5 * deviation / 2000**0.5).all()
    if isinstance(method, jlora.PVeRA):
        both, b = (np.asarray(m) for m in shared_matrices(0, 6, 4, 5, halves=2))
        update = adapter[""].factors
        spread = np.exp(x @ both[:, 5:] * np.asarray(update["c"])[None])  # the variance of each number between A and B
        variance = spread @ np.square(b * np.asarray(update["b"])[None])
        np.testing.assert_allclose(np.square(deviation), variance, rtol=0.2)
