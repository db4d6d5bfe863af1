"""The law for exported programs: `jax.export` with static and symbolic sizes, for the CPU and the TPU, and back.

Every axis of the inputs that plain JAX can export with a symbolic size is one in turn. The reference is the plain
program on merged parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from tests.support import toy_model
from tests.support.draw import drawn
from tests.support.int8_rows import rounded
from tests.support.weight_uses import KINDS, Kind, mesh

Axes = tuple[tuple[str, int], ...]  # axes of inputs, by name and number
Tree = Any

ALWAYS = {"mlp", "einsum_transposed", "index", "take_fill", "tied_embedding", "conv_2d", "ragged_experts"}
NO_FREE_AXIS = {"kernel_on_the_left", "batch_axis"}  # the weight has every axis of the input
PLATFORMS = ("cpu", "tpu")


def name(kind: Kind) -> str:
    return kind.name


def shape_of(a: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(a), a.dtype)


def with_symbols(inputs: dict[str, np.ndarray], axes: Axes) -> dict[str, jax.ShapeDtypeStruct]:
    (symbol,) = export.symbolic_shape("b")
    return {
        name: jax.ShapeDtypeStruct([symbol if (name, k) in axes else n for k, n in enumerate(v.shape)], v.dtype)
        for name, v in inputs.items()
    }


def exported(fun: Callable[..., Any], *args: Tree) -> export.Exported:
    """The program of the leaves of the arguments."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(shape_of, args))
    flat = jax.jit(lambda *leaves: fun(*jax.tree.unflatten(treedef, leaves)))
    return export.export(flat, platforms=PLATFORMS)(*leaves)


def call(program: export.Exported, *args: Tree) -> Any:
    """The result of the program after it was serialised and read again."""
    leaves = jax.tree.leaves(args)
    if program.nr_devices > 1:
        leaves = jax.device_put(leaves, NamedSharding(mesh(), PartitionSpec()))
    return jax.jit(export.deserialize(program.serialize()).call)(*leaves)


def free_axes(kind: Kind, params: Tree, inputs: dict[str, np.ndarray]) -> Iterator[Axes]:
    """The axes of one size, several at once if they belong together, that plain JAX accepts as symbolic."""
    axes = [(name, k, n) for name, v in inputs.items() for k, n in enumerate(v.shape)]
    for size in dict.fromkeys(n for *_, n in axes):
        of_size = [(name, k) for name, k, n in axes if n == size]
        for count in range(1, len(of_size) + 1):
            for chosen in itertools.combinations(of_size, count):
                try:
                    exported(kind.use, params, with_symbols(inputs, chosen))
                except Exception:  # JAX raises many kinds of error for sizes that must be equal
                    continue
                yield chosen


def on_merged_weights(fun: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, adapter, x: fun(jlora.merge(params, adapter), x)


def hold(kind: Kind, base: Callable[[np.ndarray], Any] = lambda w: w, *, every_axis: bool) -> None:
    arrays, inputs = kind.values(np.random.default_rng(0))
    params = {name: base(w) if name in kind.weights else w for name, w in arrays.items()}
    sites = jlora.trace(kind.use, params, inputs)
    adapter = toy_model.random_adapter(sites, dict.fromkeys(kind.weights, jlora.LoRA(rank=1)))
    adapted = jlora.adapt(kind.use, on_dense="error")
    expected = np.asarray(jax.jit(on_merged_weights(kind.use))(params, adapter, inputs))
    free = list(itertools.islice(free_axes(kind, arrays, inputs), None if every_axis else 1))
    assert free or kind.name in NO_FREE_AXIS
    for axes in [(), *free] if every_axis else free:
        symbolic = with_symbols(inputs, axes)
        traced = jlora.trace(kind.use, params, symbolic)
        assert {path: site.roles for path, site in traced.items()} == {path: site.roles for path, site in sites.items()}
        assert not jlora.explain(kind.use, params, adapter, symbolic).dense
        assert str(traced)
        value = call(exported(adapted, params, adapter, symbolic), params, adapter, inputs)
        tolerance = 2e-2 if kind.coarse else 2e-5  # the program itself may cast to bfloat16
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance * np.nanmax(np.abs(expected)))


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name in ALWAYS or drawn("export", kind.name)], ids=name
)
def test_a_batch_of_symbolic_size(kind: Kind) -> None:
    hold(kind, every_axis=False)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_every_axis_of_symbolic_size(kind: Kind) -> None:
    hold(kind, every_axis=True)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_quantized_weights(kind: Kind) -> None:
    hold(kind, rounded, every_axis=True)


def recurrent(p: Tree, x: jax.Array) -> jax.Array:
    def step(state: jax.Array, now: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(now @ p["w"] + state @ p["u"]), None

    return lax.scan(step, jnp.zeros((x.shape[1], 4)), x)[0]


def attention(p: Tree, x: jax.Array) -> jax.Array:
    query, key = (jnp.einsum("bsi,io->bso", x, p[name]) for name in ("w", "u"))
    weights = jax.nn.softmax(jnp.einsum("bso,bto->bst", query, key))
    return jnp.einsum("bst,bto->bso", weights, x + p["w"][jnp.arange(x.shape[1])][None])


def row_of_each_token(p: Tree, x: jax.Array) -> jax.Array:
    return jnp.einsum("bsi,bsio->bso", x, jnp.stack([p["w"], p["u"]])[(x[..., 0] > 0).astype(jnp.int32)])


def repeated_for_each_entry(p: Tree, x: jax.Array) -> jax.Array:
    return x @ jnp.broadcast_to(p["w"], (x.shape[0], 4, 4)) + x @ jnp.tile(p["u"][None], (x.shape[0], 1, 1))


def branches(p: Tree, x: jax.Array) -> jax.Array:
    return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: (x @ p["u"]) @ p["u"], x)


def one_step_for_each_entry(p: Tree, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, x.shape[0], lambda k, y: y.at[k].add(x[k] @ p["w"] @ p["u"]), x)


def rematerialised(p: Tree, x: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda p, x: jax.vmap(lambda x: jnp.tanh(x @ p["w"]) @ p["u"])(x))(p, x)


def convolutions(p: Tree, x: jax.Array) -> jax.Array:
    layout = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x, p["w"][None], (2,), "SAME", dimension_numbers=layout)
    return lax.conv_transpose(y, p["u"][None], (2,), "SAME", dimension_numbers=layout)


def gradient(p: Tree, x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: (jnp.tanh(x @ p["w"]) @ p["u"]).sum())(x)


SEQUENCES = [recurrent, attention, row_of_each_token, repeated_for_each_entry, branches, one_step_for_each_entry]
SEQUENCES += [rematerialised, convolutions, gradient]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("method", [jlora.LoRA(2), jlora.LoHa(2)], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("fun", SEQUENCES, ids=lambda fun: fun.__name__)
def test_batches_and_sequences_of_symbolic_sizes(fun: Callable[..., Any], method: jlora.Method) -> None:
    rng = np.random.default_rng(0)
    params = {name: np.asarray(rng.normal(size=(4, 4)), np.float32) for name in ("w", "u")}
    x = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, s, 4"), jnp.float32)
    adapter = toy_model.random_adapter(jlora.trace(fun, params, symbolic), dict.fromkeys(params, method))
    value = call(exported(jlora.adapt(fun), params, adapter, symbolic), params, adapter, x)
    expected = jax.jit(on_merged_weights(fun))(params, adapter, x)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)


def gradients_of(fun: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """The gradients with respect to the adapter, as a list."""
    return lambda *args: jax.tree.leaves(jax.grad(fun, 1)(*args))


def test_an_exported_training_step() -> None:
    """Its gradient is that of the merged program; with dropout it exports as well."""
    rng = np.random.default_rng(0)
    params = {"w": np.asarray(rng.normal(size=(7, 4)), np.float32)}
    tokens = jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32)

    def fun(p: Tree, tokens: jax.Array) -> jax.Array:
        return jnp.sum((p["w"][tokens] @ p["w"].T) ** 2)

    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape("b, s"), jnp.int32)
    sites = jlora.trace(fun, params, symbolic)
    adapter = jlora.init(jax.random.key(0), sites, {"w": jlora.LoRA(2)})
    adapter = jax.tree.map(lambda a: a + 0.2, adapter)
    step = exported(gradients_of(jlora.adapt(fun)), params, adapter, symbolic)
    expected = jax.grad(lambda adapter: fun(jlora.merge(params, adapter), tokens))(adapter)
    for value, reference in zip(call(step, params, adapter, tokens), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, reference, rtol=1e-4)

    def with_dropout(p: Tree, adapter: Tree, tokens: jax.Array) -> jax.Array:
        return jlora.adapt(fun)(p, jlora.with_dropout(adapter, jax.random.key(1)), tokens)

    adapter = jlora.init(jax.random.key(0), sites, {"w": jlora.LoRA(2, dropout=0.5)})
    gradients = call(exported(gradients_of(with_dropout), params, adapter, symbolic), params, adapter, tokens)
    assert all(np.isfinite(value).all() for value in gradients)
