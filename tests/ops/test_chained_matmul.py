"""Two factors in a row of which the value between them is not kept: values, derivatives, and what is kept."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora._ops.chained_matmul import chained_matmul
from tests.support import compiled as report
from tests.support.agreement import close

SIZES = {"s": 2, "t": 3, "a": 4, "c": 5, "r": 2, "q": 3, "d": 6, "e": 2}
TERMS = [
    ("star", "ac", "rd", "stcd"),
    ("tar", "ca", "dr", "tdc"),
    ("rat", "ac", "rd", "dct"),
    ("sarqt", "ac", "qdre", "setcd"),
]


@pytest.mark.drawn(3)
@pytest.mark.parametrize(("terms", "first"), list(itertools.product(TERMS, (True, False))))
def test_it_is_einsum(terms: tuple[str, str, str, str], first: bool) -> None:
    arrays = [jax.random.normal(jax.random.key(k), [SIZES[c] for c in term]) for k, term in enumerate(terms[:3])]
    others = [a + 1 for a in arrays]

    def ours(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return chained_matmul(x, a, b, terms, first=first, precision=None, dtype=jnp.dtype(jnp.float32))

    def plain(*operands: jax.Array) -> jax.Array:
        return jnp.einsum(f"{','.join(terms[:3])}->{terms[3]}", *operands)

    def all_of(f):
        def loss(*operands: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(jnp.sin(f(*operands))))

        stacked = [jnp.stack(pair) for pair in zip(arrays, others, strict=True)]
        return (
            f(*arrays),
            jax.grad(loss, (0, 1, 2))(*arrays),
            [jax.grad(loss, k)(*arrays) for k in range(3)],
            jax.jvp(f, arrays, others),
            jax.jacfwd(jax.grad(loss, (0, 1)), 1)(*arrays),
            jax.grad(lambda *a: jnp.vdot(others[1], jax.grad(loss, 1)(*a)), (0, 2))(*arrays),
            jax.vmap(f)(*stacked),
            jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(stacked[0], *arrays[1:]),
            jax.grad(lambda *a: jax.vmap(loss)(*a).sum(), (0, 1, 2))(*stacked),
            jax.grad(jax.checkpoint(loss), (0, 1, 2))(*arrays),
            jax.grad(
                lambda c: jax.lax.scan(lambda h, _: (h * f(h, c, arrays[2]).mean(), None), arrays[0], None, 2)[0].sum()
            )(arrays[1]),
        )

    results = [jax.jit(all_of, static_argnums=0)(g) for g in (ours, plain)]
    close(results[0], results[1], 1e-5)


def test_a_kronecker_product_keeps_one_small_value() -> None:
    """Beside three values of the activation's size, as LoRA: its input times A, and nothing else."""
    tokens, width, rank = 256, 1024, 8
    params, x = (
        {"w": jax.ShapeDtypeStruct((width, width), jnp.float32)},
        jax.ShapeDtypeStruct((4, tokens // 4, width), "f4"),
    )

    def f(p, x):
        return jnp.tanh(x @ p["w"])

    def temporary(method: jlora.Method) -> int:
        sites = jlora.trace(f, params, x)
        adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, method))

        def loss(adapter, params, x):
            return jnp.mean(jnp.square(jlora.adapt(f)(params, adapter, x) - x))

        return report.memory(jax.jit(jax.value_and_grad(loss)).lower(adapter, params, x).compile()).temp_size_in_bytes

    kept = 4 * tokens * 32 * rank  # by a width of 32 * 32
    assert temporary(jlora.LoKr(rank)) < temporary(jlora.LoRA(rank)) + 1.2 * kept
