"""Products by blocks of rows: values, derivatives, and what is kept."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora._ir.weight import AxisMap, TensorNetwork
from jlora._ops import rows
from jlora._ops.contraction import apply_network
from jlora._ops.maps import apply_maps
from tests.support import compiled as report
from tests.support.agreement import close

SIZES = {"s": 2, "t": 7, "a": 4, "c": 5, "r": 2, "q": 3, "d": 6, "e": 2, "n": 3, "k": 4, "p": 4}
NETWORKS = [  # x, factors, y: Kronecker products with a second factor of low rank or none, and blocks of both sides
    ("tab", ("ac", "bd"), "tcd"),
    ("stab", ("ac", "br", "rd"), "stcd"),
    ("tab", ("ac", "bd"), "cdt"),
    ("tnk", ("nkcr", "ncrd"), "tcd"),
    ("etnk", ("enkr", "nrd"), "etd"),
]
SIZES |= {"b": 3}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SMALLEST", 1)
    monkeypatch.setattr(rows, "BLOCKS", 3)


def normal(*terms: str) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(k), [SIZES[c] for c in term]) / 2 for k, term in enumerate(terms)]


def all_of(f, arrays: list[jax.Array], others: list[jax.Array]):
    """Values, all derivatives that JAX has a rule for, and these under its transformations."""

    def loss(*operands: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(f(*operands)))

    count = tuple(range(len(arrays)))
    stacked = [jnp.stack(pair) for pair in zip(arrays, others, strict=True)]
    return (
        f(*arrays),
        jax.grad(loss, count)(*arrays),
        [jax.grad(loss, k)(*arrays) for k in count[:2]],
        jax.jvp(f, tuple(arrays), tuple(others)),
        jax.grad(lambda *a: jnp.vdot(others[1], jax.grad(loss, 1)(*a)), count)(*arrays),
        jax.grad(lambda *a: jax.vmap(loss)(*a).sum(), count)(*stacked),
        jax.grad(lambda x, *a: jax.vmap(lambda x: loss(x, *a))(x).sum(), count)(stacked[0], *arrays[1:]),
        jax.vmap(jax.grad(loss, count), (0, *(None for _ in count[1:])))(stacked[0], *arrays[1:]),
        jax.grad(jax.checkpoint(loss), count)(*arrays),
    )


def agree(ours, plain, arrays: list[jax.Array]) -> None:
    others = [a[::-1] for a in arrays]
    results = [jax.jit(lambda f=f: all_of(f, arrays, others))() for f in (ours, plain)]
    close(results[0], results[1], 1e-5)


@pytest.mark.drawn(5)
@pytest.mark.parametrize(("network", "first"), list(itertools.product(NETWORKS, (True, False))))
def test_a_network_is_einsum(network: tuple[str, tuple[str, ...], str], first: bool) -> None:
    x, terms, out = network

    def ours(x_array: jax.Array, *factors: jax.Array) -> jax.Array:
        n = TensorNetwork(factors, terms)
        return apply_network(x_array, x, n, out, dtype=jnp.dtype(jnp.float32), first=first)

    def plain(*operands: jax.Array) -> jax.Array:
        return jnp.einsum(f"{','.join((x, *terms))}->{out}", *operands)

    arrays = normal(x, *terms)
    assert "while" in jax.jit(ours).lower(*arrays).as_text()
    agree(ours, plain, arrays)


@pytest.mark.drawn(4)
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize(
    ("indices", "new", "old"), [("nkp", "k", "p"), ("kp", "k", "p"), ("nre", "r", "e"), ("n", "", "")]
)
def test_a_map_is_einsum(indices: str, new: str, old: str, of_input: bool) -> None:
    """Blocks, one block, pairs, and multipliers."""
    labels = f"stn{new or 'k'}"

    def ours(x: jax.Array, array: jax.Array) -> jax.Array:
        joined = x.reshape(*x.shape[:2], -1)
        maps = [AxisMap(array, indices, new, old)]
        return apply_maps(joined, labels, SIZES, maps, of_input=of_input).reshape(x.shape)

    def plain(x: jax.Array, array: jax.Array) -> jax.Array:
        mapped = labels.replace(new, old) if new else labels
        before, after = (labels, mapped) if of_input else (mapped, labels)
        return jnp.einsum(f"{before},{indices}->{after}", x, array)

    arrays = normal(labels, indices)
    gradients = jax.jit(jax.grad(lambda *a: ours(*a).sum(), (0, 1))).lower(*arrays)
    assert "while" in gradients.as_text()
    agree(ours, plain, arrays)


def test_sixteen_bits_are_summed_in_thirty_two() -> None:
    """Ones: a sum of 512 of them by blocks would stop at 256 in bfloat16."""
    x = jnp.ones((2048, 3, 2), jnp.bfloat16)

    def f(x: jax.Array, a: jax.Array) -> jax.Array:
        return apply_maps(x, "tnk", {"t": 2048, "n": 3, "k": 2}, [AxisMap(a, "n")], of_input=False)

    gradient = jax.jit(jax.grad(lambda a: f(x, a).sum(dtype=jnp.float32)))(jnp.ones(3, jnp.bfloat16))
    assert (gradient == 4096).all()


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
