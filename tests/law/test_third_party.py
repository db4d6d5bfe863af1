"""Unmodified layers of Flax Linen, Flax NNX and Equinox: every weight of a product is adapted and stays factored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from tests.support.agreement import adapter_for, check_law, random, sides

WIDTH, BATCH, TIME = 8, 2, 5
SIZE = 0.4  # of the factors: large ones make deep blocks without a norm so steep that float32 itself is too coarse
EVERY_PRODUCT = jlora.LoRA(rank=2, alpha=3.0)


@dataclasses.dataclass(frozen=True)
class Form:
    """A program, and the paths of the weights that must be adapted when nothing but a method is named.

    Arguments:
        fun: `fun(params, *args, **kwargs)`.
        params: its parameters.
        args: arrays.
        paths: the weights that products and convolutions use.
        kwargs: passed through as they are.
        targets: what is adapted, where it is not every product.
    """

    fun: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    paths: set[str]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: Any = EVERY_PRODUCT


def numbers(*shape: int) -> jax.Array:
    return random(np.random.default_rng(1), shape, jnp.float32)


def tokens() -> jax.Array:
    return jnp.arange(BATCH * TIME).reshape(BATCH, TIME) * 3 % 7


def linen(module: nn.Module, *args: Any, paths: set[str], **kwargs: Any) -> Form:
    """A Linen module, whose parameters are those of its `init`."""
    variables = jax.jit(module.init, static_argnames=("method",))(jax.random.key(0), *args, **kwargs)
    return Form(module.apply, variables, args, {f"params/{path}" for path in paths}, kwargs)


def of_nnx(module: nnx.Module, *args: Any, paths: set[str], call: str = "__call__") -> Form:
    """An NNX module, split into its graph and its parameters."""
    graph, params = nnx.split(module)
    return Form(lambda params, *args: getattr(nnx.merge(graph, params), call)(*args), params, args, paths)


def of_eqx(module: Any, *args: Any, paths: set[str], targets: Any = EVERY_PRODUCT) -> Form:
    """An Equinox module, which is its own parameters, over a batch."""
    return Form(lambda module, *args: jax.vmap(module)(*args), module, args, paths, targets=targets)


def linen_attention() -> Form:
    paths = {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}
    return linen(nn.MultiHeadDotProductAttention(num_heads=2), numbers(BATCH, TIME, WIDTH), paths=paths)


def nnx_attention() -> Form:
    module = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=nnx.Rngs(0))
    paths = {"query/kernel", "key/kernel", "value/kernel", "out/kernel"}
    return of_nnx(module, numbers(BATCH, TIME, WIDTH), paths=paths)


def equinox_attention() -> Form:
    module = eqx.nn.MultiheadAttention(2, WIDTH, key=jax.random.key(0))
    x = numbers(BATCH, TIME, WIDTH)
    paths = {f"{name}_proj/weight" for name in ("query", "key", "value", "output")}
    return of_eqx(module, x, x, x, paths=paths)


def linen_conv() -> Form:
    module = nn.Conv(6, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), feature_group_count=2, padding="CIRCULAR")
    return linen(module, numbers(BATCH, 9, 7, 4), paths={"kernel"})


def linen_conv_one_dimensional() -> Form:
    return linen(nn.Conv(6, 3, padding="CAUSAL"), numbers(BATCH, TIME, 4), paths={"kernel"})


def linen_conv_depthwise() -> Form:
    return linen(nn.Conv(8, (3, 3), feature_group_count=4), numbers(BATCH, 6, 5, 4), paths={"kernel"})


def linen_conv_transpose() -> Form:
    module = nn.ConvTranspose(6, (3, 2), strides=(2, 2))
    return linen(module, numbers(BATCH, 4, 3, 5), paths={"kernel"})


def linen_conv_transpose_of_a_kernel() -> Form:
    """`transpose_kernel=True` takes the kernel of the convolution that it transposes, reversed and turned."""
    module = nn.ConvTranspose(6, (3, 2), strides=(2, 2), transpose_kernel=True)
    return linen(module, numbers(BATCH, 4, 3, 5), paths={"kernel"})


def nnx_conv() -> Form:
    return of_nnx(nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)), numbers(BATCH, 7, 6, 4), paths={"kernel"})


def nnx_conv_transpose() -> Form:
    module = nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), rngs=nnx.Rngs(0))
    return of_nnx(module, numbers(BATCH, 4, 3, 4), paths={"kernel"})


def equinox_conv() -> Form:
    module = eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, 4, 7, 6), paths={"weight"})


def equinox_conv_transpose() -> Form:
    module = eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, 4, 4, 3), paths={"weight"})


class Tied(nn.Module):
    """An embedding that is the head as well."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(7, WIDTH, name="embed")
        return embed.attend(nn.Dense(WIDTH, name="mix")(embed(ids)))


def linen_tied_embedding() -> Form:
    return linen(Tied(), tokens(), paths={"embed/embedding", "mix/kernel"})


class TiedNnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, WIDTH, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.mix(self.embed(ids)))


def nnx_tied_embedding() -> Form:
    return of_nnx(TiedNnx(nnx.Rngs(0)), tokens(), paths={"embed/embedding", "mix/kernel"})


def nnx_embedding() -> Form:
    form = of_nnx(nnx.Embed(7, WIDTH, rngs=nnx.Rngs(0)), tokens(), paths={"embedding"})
    return dataclasses.replace(form, targets={"embedding": EVERY_PRODUCT})


def equinox_embedding() -> Form:
    """Twice under `vmap`, over the batch and over the positions: a gather with a start index map of two parts."""
    module = eqx.nn.Embedding(7, WIDTH, key=jax.random.key(0))
    form = of_eqx(module, tokens(), paths={"weight"}, targets={"weight": EVERY_PRODUCT})
    return dataclasses.replace(form, fun=lambda module, ids: jax.vmap(jax.vmap(module))(ids))


class Block(nn.Module):
    """A block of a transformer, as a scan wants it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(x))), None


class Stack(nn.Module):
    """Blocks whose parameters are stacked, rematerialised in the backward pass."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="blocks")(x, None)
        return x


def linen_scan_of_remat() -> Form:
    heads = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    paths = {*heads, "blocks/up/kernel", "blocks/down/kernel"}
    return linen(Stack(), numbers(BATCH, TIME, WIDTH), paths=paths)


class BlockNnx(nnx.Module):
    """A block in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


class StackNnx(nnx.Module):
    """Blocks that `nnx.vmap` makes and `nnx.scan` runs through."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> BlockNnx:
            return BlockNnx(rngs)

        self.blocks = make(rngs)

    def scanned(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: jax.Array, block: BlockNnx) -> jax.Array:
            return block(x)

        return run(x, self.blocks)

    def side_by_side(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None), out_axes=0)(self.blocks, x)


NNX_STACK = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")} | {
    "blocks/up/kernel",
    "blocks/down/kernel",
}


def nnx_scan() -> Form:
    return of_nnx(StackNnx(nnx.Rngs(0)), numbers(BATCH, TIME, WIDTH), paths=NNX_STACK, call="scanned")


def nnx_vmap() -> Form:
    return of_nnx(StackNnx(nnx.Rngs(0)), numbers(BATCH, TIME, WIDTH), paths=NNX_STACK, call="side_by_side")


def linen_lstm() -> Form:
    gates = {f"cell/{source}{gate}/kernel" for source in "ih" for gate in "ifgo"}
    return linen(nn.RNN(nn.LSTMCell(6)), numbers(BATCH, TIME, WIDTH), paths=gates)


def linen_optimized_lstm() -> Form:
    """It concatenates the kernels of its gates before it uses them, in every step."""
    gates = {f"cell/{source}{gate}/kernel" for source in "ih" for gate in "ifgo"}
    return linen(nn.RNN(nn.OptimizedLSTMCell(6)), numbers(BATCH, TIME, WIDTH), paths=gates)


def nnx_lstm() -> Form:
    """The name `if` is a word of Python, so NNX has `if_`."""
    module = nnx.RNN(nnx.LSTMCell(WIDTH, 6, rngs=nnx.Rngs(0)))
    gates = {f"cell/{gate}/kernel" for gate in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")}
    return of_nnx(module, numbers(BATCH, TIME, WIDTH), paths=gates)


def equinox_gru() -> Form:
    """One weight for all gates on the left of the product, whose result is split."""
    module = eqx.nn.GRUCell(WIDTH, 6, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, WIDTH), numbers(BATCH, 6), paths={"weight_ih", "weight_hh"})


def linen_einsum() -> Form:
    return linen(nn.Einsum((2, 4, 3), "bthd,hdo->bto"), numbers(BATCH, TIME, 2, 4), paths={"kernel"})


def linen_local_conv() -> Form:
    """A kernel of its own at every position."""
    return linen(nn.ConvLocal(3, (2, 2)), numbers(BATCH, 4, 3, 2), paths={"kernel"})


def linen_dense_general() -> Form:
    """Several axes in, several out, and one that is batched."""
    module = nn.DenseGeneral((3, 2), axis=(-2, -1), batch_dims=(0,))
    return linen(module, numbers(3, BATCH, 4, 2), paths={"kernel"})


def equinox_mlp() -> Form:
    module = eqx.nn.MLP(WIDTH, 3, 12, 2, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, WIDTH), paths={f"layers/{k}/weight" for k in range(3)})


class Noisy(nn.Module):
    """Batch statistics and dropout, with an argument that is static."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Dense(12, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(0.4, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="down")(x)


def linen_batch_statistics() -> Form:
    module, x = Noisy(), numbers(6, WIDTH)
    variables = module.init(jax.random.key(0), x, train=False)
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}
    return Form(module.apply, variables, (x,), {"params/up/kernel", "params/down/kernel"}, kwargs)


class NoisyNnx(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.down = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


def nnx_batch_statistics() -> Form:
    graph, params, rest = nnx.split(NoisyNnx(nnx.Rngs(0)), nnx.Param, ...)

    def fun(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)  # the statistics change inside of a gradient
        y = model(x)
        return y, nnx.state(model, nnx.Not(nnx.Param))

    return Form(fun, params, (rest, numbers(6, WIDTH)), {"up/kernel", "down/kernel"})


def nnx_whole_model() -> Form:
    """Split into graph and state alone: keys, counters and statistics are among the parameters."""
    graph, params = nnx.split(NoisyNnx(nnx.Rngs(0)))

    def fun(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, copy=True)
        y = model(x)
        return y, nnx.state(model, nnx.Not(nnx.Param))

    return Form(fun, params, (numbers(6, WIDTH),), {"up/kernel", "down/kernel"})


FORMS: list[Callable[[], Form]] = [
    linen_attention,
    nnx_attention,
    equinox_attention,
    linen_conv,
    linen_conv_one_dimensional,
    linen_conv_depthwise,
    linen_conv_transpose,
    linen_conv_transpose_of_a_kernel,
    nnx_conv,
    nnx_conv_transpose,
    equinox_conv,
    equinox_conv_transpose,
    linen_tied_embedding,
    nnx_tied_embedding,
    nnx_embedding,
    equinox_embedding,
    linen_scan_of_remat,
    nnx_scan,
    nnx_vmap,
    linen_lstm,
    linen_optimized_lstm,
    nnx_lstm,
    equinox_gru,
    linen_einsum,
    linen_local_conv,
    linen_dense_general,
    equinox_mlp,
    linen_batch_statistics,
    nnx_batch_statistics,
    nnx_whole_model,
]


@pytest.mark.parametrize("make", FORMS, ids=lambda make: make.__name__)
def test_every_weight_is_factored_and_the_law_holds(make: Callable[[], Form]) -> None:
    form = make()
    sites = jlora.trace(form.fun, form.params, *form.args, **form.kwargs)
    adapter = adapter_for(sites, form.targets, np.random.default_rng(2), size=SIZE)
    kernels = {path for path, site in sites.items() if path.endswith(("kernel", "weight")) and len(site.shape) > 1}
    assert kernels <= set(adapter) == form.paths
    assert jlora.explain(form.fun, form.params, adapter, *form.args, **form.kwargs).dense == ()
    check_law(form.fun, form.params, adapter, *form.args, on_dense="error", **form.kwargs)


@pytest.mark.parametrize("make", FORMS[-3:], ids=lambda make: make.__name__)
def test_state_that_a_program_changes_is_that_of_the_merged_program(make: Callable[[], Form]) -> None:
    """The statistics depend on the adapter, and leave the program changed: what is compared above is not trivial."""
    form = make()
    sites = jlora.trace(form.fun, form.params, *form.args, **form.kwargs)
    adapter = adapter_for(sites, form.targets, np.random.default_rng(2), size=SIZE)
    ((_, state), _), ((_, expected), _) = sides(form.fun, form.params, adapter, *form.args, **form.kwargs)
    _, base = form.fun(form.params, *form.args, **form.kwargs)
    for new, same, old in zip(*map(floats, (state, expected, base)), strict=True):
        np.testing.assert_allclose(new, same, rtol=2e-5, atol=2e-5)
        assert np.abs(new - old).max() > 1e-2


def floats(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
