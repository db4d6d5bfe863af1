"""Steps for `benchmarks.device`: the decoder in all forms, and compiled steps that keep their own state."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jlora
from benchmarks import _byhand, _llama

FORMS = {"bf16": ("jlora", "by hand", "merged", "full"), "nf4": ("jlora", "by hand", "merged")}
TARGETS = r"layers/(wq|wk|wv|wo|gate|up|down)"
RANK = 16
LLAMA = _llama.Sizes(8, 4096, 14336, 32, 8, vocabulary=32768, length=2048)
TINY = _llama.Sizes(2, 512, 512, 2, 2, vocabulary=512, length=128, queries=64)
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any, jax.Array]]


def adam(loss: Callable[..., jax.Array]) -> Step:
    """`(trained, moments, frozen, batch) -> (trained, moments, loss)`, with Adam. The first two are donated."""

    def step(trained: Any, moments: Any, frozen: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(trained, frozen, batch)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, moments[1], gradients)
        new = jax.tree.map(lambda w, m, v: w - 1e-4 * m / (jnp.sqrt(v) + 1e-8), trained, first, second)
        return new, (first, second), value

    return jax.jit(step, donate_argnums=(0, 1))


def llama(options: argparse.Namespace, form: str, base: str) -> tuple[Step, tuple[Any, Any, Any, Any]]:
    """A step of the decoder and its abstract arguments."""
    mesh, sizes = one_device_mesh(), options.sizes
    params = _llama.params(sizes, mesh, _llama.BASES[base])
    tokens = _llama.array(mesh, (options.batch, sizes.length), _llama.BATCHED, jnp.int32)
    model, by_hand = _llama.loss(sizes), _llama.loss(sizes, _byhand.standard(2.0))
    adapted = jlora.adapt(model, on_dense="error")
    with jax.set_mesh(mesh):
        sites = jlora.trace(model, params, tokens)
        adapter = jax.eval_shape(
            lambda: jlora.init(jax.random.key(0), sites, {TARGETS: jlora.LoRA(RANK, alpha=2.0 * RANK)})
        )
    factors = {path: (update.factors["a"], update.factors["b"]) for path, update in adapter.items()}
    trained, loss = {
        "jlora": (adapter, lambda adapter, params, tokens: adapted(params, adapter, tokens)),
        "by hand": (factors, lambda factors, params, tokens: by_hand(_byhand.attach(params, factors), tokens)),
        "merged": (adapter, lambda adapter, params, tokens: model(jlora.merge(params, adapter), tokens)),
        "full": (params, lambda params, _, tokens: model(params, tokens)),
    }[form]
    return adam(loss), (trained, (trained, trained), None if form == "full" else params, tokens)


def one_device_mesh() -> Mesh:
    """The mesh of the decoder on the first device."""
    return jax.make_mesh((1, 1, 1), _llama.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def filled(tree: Any, key: jax.Array | None) -> Any:
    """Arrays in place of abstract ones: small random numbers, or zeros if there is no key. Arrays are copied."""

    def fill(number: int, leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jnp.copy(leaf)  # a step donates its arguments
        if key is None or leaf.dtype == jnp.int32:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.randint(jax.random.fold_in(key, number), leaf.shape, 0, 100, leaf.dtype)
        return 0.02 * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([fill(number, leaf) for number, leaf in enumerate(leaves)])


class Runner:
    """A compiled step that keeps its own state. Its arguments are zeros or random; moments are zeros.

    Arguments:
        step: the jitted step.
        args: of the step, abstract or arrays: trained, moments, frozen, batch.
        key: for random arguments; None means zeros.
        frozen: arrays in place of those of `args`, which several steps share.
        repeat: how many steps one call runs.
    """

    def __init__(
        self,
        step: Any,
        args: tuple[Any, Any, Any, Any],
        key: jax.Array | None,
        frozen: Any = None,
        repeat: int = 1,
    ) -> None:
        self.repeat = repeat
        trained, moments, abstract_frozen, batch = args
        self.frozen = frozen if frozen is not None else filled(abstract_frozen, key)
        self.batch = filled(batch, key)
        self.state = filled(trained, key), filled(moments, None)
        lowered = step.lower(*self.state, self.frozen, self.batch)
        start = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        for _ in range(self.repeat):
            trained, moments, self.value = self.compiled(*self.state, self.frozen, self.batch)
            self.state = trained, moments
        return self.state, self.value

    def bytes(self) -> int | None:
        """What the compiler says that the step needs."""
        m = self.compiled.memory_analysis()
        parts = (m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes) if m else None
        return None if parts is None else sum(parts) - m.alias_size_in_bytes
