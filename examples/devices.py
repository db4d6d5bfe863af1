"""Shared by the examples for many devices: the job of `finetune_reviews.py` on a mesh.

`job` is the model, the data and the trainable parameters; `step` is one training step, which does not depend on the
devices; `Layout` places everything on a mesh. The losses equal those of one device up to rounding, for every mesh.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import assets
import jlora
import minilm
import reviews
import training
from reviews import Split

TARGETS = r"params/layer_\d+/(attention|feed_forward)/\w+/kernel"

# What a rematerialised layer saves for the backward pass.
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "low-rank": jax.checkpoint_policies.save_only_these_names("jlora"),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all examples for many devices have."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--batch", type=int, default=32, help="sentences of a step, of all devices (default: 32)")
    parser.add_argument("--accumulate", type=int, default=1, metavar="K", help="parts of a batch (default: 1)")
    parser.add_argument("--keep", choices=POLICIES, help="rematerialise layers and save only this (default: no)")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA factors; the scale is always 2 (default: 8)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of head, adapter and data order (default: 0)")
    parser.add_argument("--tiny", action="store_true", help="a small random model on random data; no download")
    parser.add_argument("--devices", type=int, help="simulate this many on the CPU (default: use the real ones)")
    return parser


def simulate(count: int | None) -> None:
    """Simulates `count` devices on the CPU. To be called before JAX is used."""
    if count:
        jax.config.update("jax_num_cpu_devices", count)


@dataclass(frozen=True)
class Job:
    """The model, the data and the trainable parameters, on the host.

    Arguments:
        variables: the frozen variables of the encoder.
        train: the training sentences.
        head: a new classification head.
        init: makes a new adapter.
        logits: (trainable, variables, ids, mask) -> (batch, classes), with an adapter and a head in `trainable`.
        optimiser: the optimiser of both.
    """

    variables: Any
    train: Split
    head: Any
    init: Callable[[], Any]
    logits: training.Logits
    optimiser: optax.GradientTransformation


def job(options: argparse.Namespace) -> Job:
    """The job that the options describe."""
    if options.tiny:
        model, variables, train = _tiny()
    else:
        folder, sentences = assets.minilm(), assets.reviews()
        model, variables = minilm.load(folder)
        train, _, _ = reviews.load(sentences, folder / "tokenizer.json")
    model = model.clone(keep=POLICIES.get(options.keep))
    head_key, adapter_key = jax.random.split(jax.random.key(options.seed))
    sites = jlora.trace(model.apply, variables, train.ids[:1], train.mask[:1])
    targets = {TARGETS: jlora.LoRA(rank=options.rank, alpha=2.0 * options.rank)}
    adapted = jlora.adapt(model.apply)

    def logits(trainable: Any, variables: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return training.apply_head(trainable["head"], adapted(variables, trainable["adapter"], ids, mask))

    return Job(
        variables=variables,
        train=train,
        head=training.init_head(head_key, model.width, classes=2),
        init=lambda: jlora.init(adapter_key, sites, targets),
        logits=logits,
        optimiser=training.adamw(options.lr, options.steps),
    )


def _tiny() -> tuple[minilm.MiniLM, Any, Split]:
    """A small random encoder, and random sentences whose label depends on their first token."""
    model = minilm.MiniLM(vocabulary=64, positions=48, types=2, width=16, layers=1, heads=4, hidden=32, epsilon=1e-12)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (96, 48)).astype(np.int32)
    mask = (np.arange(48) < rng.integers(8, 17, 96)[:, None]).astype(np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids[:1], mask[:1])
    variables = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), shapes)
    return model, variables, Split(ids, mask, ids[:, 0] % 2)


def step(job: Job, accumulate: int = 1, axis: str | None = None) -> Callable[..., Any]:
    """One step, (trainable, state, variables, ids, mask, labels) -> (trainable, state, loss), not compiled.

    Arguments:
        job: the model and the optimiser.
        accumulate: number of parts of the batch; their gradients are averaged.
        axis: under `jax.pmap`, the axis over which gradients are averaged.
    """

    gradient_of_part = jax.value_and_grad(training.mean_loss(job.logits))

    def gradient(trainable: Any, variables: Any, batch: Split) -> tuple[jax.Array, Any]:
        if accumulate == 1:
            return gradient_of_part(trainable, variables, *batch)

        def add_part(total: Any, part: Split) -> tuple[Any, None]:
            new = gradient_of_part(trainable, variables, *part)
            return jax.tree.map(lambda a, b: a + b / accumulate, total, new), None

        # Every k-th row, so that each part has rows of every device.
        parts = Split(*(jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0) for a in batch))
        return lax.scan(add_part, jax.tree.map(jnp.zeros_like, (jnp.zeros(()), trainable)), parts)[0]

    def run(trainable: Any, state: Any, variables: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> Any:
        value, gradients = gradient(trainable, variables, Split(ids, mask, labels))
        if axis:
            value, gradients = lax.pmean((value, gradients), axis)
        updates, state = job.optimiser.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return run


def batches(job: Job, options: argparse.Namespace) -> Iterator[training.Rows]:
    """The rows of every batch. The seed determines all of them, so the number of a step is the position in the data."""
    return training.stream(job.train, options.batch, options.seed)


# Partitions on a mesh of two axes: rows of the batch and one axis of each weight are sharded along "data" (FSDP), heads
# and hidden units along "model" (tensor parallelism). Arrays that no pattern matches are replicated.
SPECS = {
    r"params/layer_\d+/attention/(query|key|value)/kernel": P("data", "model", None),
    r"params/layer_\d+/attention/(query|key|value)/bias": P("model", None),
    r"params/layer_\d+/attention/out/kernel": P("model", None, "data"),
    r"params/layer_\d+/feed_forward/up/kernel": P("data", "model"),
    r"params/layer_\d+/feed_forward/up/bias": P("model"),
    r"params/layer_\d+/feed_forward/down/kernel": P("model", "data"),
    r"params/word_embedding/embedding": P(None, "data"),
}


class LayoutError(ValueError):
    """The mesh does not fit the job; the message states the axis, its size and the mesh."""


def _misfit(array: str, axis: int, size: int, name: str, mesh: Mesh) -> str:
    """One line of a `LayoutError`: an axis whose size the mesh does not divide."""
    shape = "x".join(map(str, mesh.devices.shape))
    return f"axis {axis} of {array} has size {size}, and the mesh {shape} divides it by {mesh.shape[name]} ({name})"


def mesh(shape: str) -> Mesh:
    """A mesh from `"4x2"`: four along "data", two along "model"."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
        raise LayoutError(f"A mesh is two numbers such as 4x2 (data x model), not {shape!r}.")
    data, model = map(int, shape.split("x"))
    if data * model != jax.device_count():
        raise LayoutError(
            f"The mesh {shape} has {data * model} devices, and there are {jax.device_count()}. "
            f"--devices {data * model} simulates that many on the CPU."
        )
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True)
class Layout:
    """A mesh, and the shardings of the variables on it."""

    mesh: Mesh
    variables: Any

    @staticmethod
    def of(job: Job, mesh: Mesh, batch: int, accumulate: int) -> Layout:
        """The layout of a job.

        Raises:
            LayoutError: if the mesh does not divide the size of an axis that is sharded along it.
        """
        misfits = [] if batch % accumulate == 0 else [f"--accumulate {accumulate} does not divide --batch {batch}"]
        part = batch // accumulate
        if part % mesh.shape["data"]:
            misfits.append(_misfit("a batch's part", 0, part, "data", mesh))

        def place(keypath: Any, leaf: Any) -> NamedSharding:
            path = jax.tree_util.keystr(keypath, simple=True, separator="/")
            spec = next((spec for pattern, spec in SPECS.items() if re.fullmatch(pattern, path)), P())
            for axis, (size, name) in enumerate(zip(leaf.shape, spec, strict=False)):
                if name and size % mesh.shape[name]:
                    misfits.append(_misfit(path, axis, size, name, mesh))
            return NamedSharding(mesh, spec)

        variables = jax.tree_util.tree_map_with_path(place, job.variables)
        if misfits:
            raise LayoutError("The mesh does not fit:\n  " + "\n  ".join(misfits))
        return Layout(mesh, variables)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device holds."""
        return NamedSharding(self.mesh, P())

    def put(self, array: Any, sharding: NamedSharding) -> jax.Array:
        """Places an array of the host; each process transfers only the parts of its own devices."""
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def start(self, job: Job) -> tuple[Any, Any, Any]:
        """Variables, trainable parameters and optimiser state. Factors are created sharded."""
        variables = jax.tree.map(self.put, job.variables, self.variables)
        adapter_shardings = jlora.shardings(jax.eval_shape(job.init), variables)
        adapter = jax.jit(job.init, out_shardings=adapter_shardings)()
        head = jax.tree.map(lambda a: self.put(a, self.replicated), job.head)
        trainable = {"adapter": adapter, "head": head}
        shardings = {"adapter": adapter_shardings, "head": jax.tree.map(lambda _: self.replicated, head)}
        return variables, trainable, self._state(job, trainable, shardings)

    def _state(self, job: Job, trainable: Any, shardings: Any) -> Any:
        """The optimiser's state: moments are sharded as their parameters, counters are replicated."""
        state_shardings = optax.tree.map_params(
            job.optimiser,
            lambda _, sharding: sharding,
            jax.eval_shape(job.optimiser.init, trainable),
            shardings,
            transform_non_params=lambda _: self.replicated,
        )
        return jax.jit(job.optimiser.init, out_shardings=state_shardings)(trainable)

    def step(self, job: Job, accumulate: int, trainable: Any, state: Any) -> Callable[..., Any]:
        """One jitted step; the outputs have the shardings of the inputs."""
        shardings = jax.tree.map(lambda a: a.sharding, (trainable, state))
        return jax.jit(step(job, accumulate), out_shardings=(*shardings, self.replicated))

    def batch(self, split: Split, rows: np.ndarray, length: int) -> Split:
        """One batch; each process reads only the rows of its own devices."""
        sharding = NamedSharding(self.mesh, P("data"))

        def field(k: int, *shape: int) -> jax.Array:
            def read(index: Any) -> np.ndarray:  # a tuple of slices
                return np.asarray(training.cut(split, rows[index[0]], length)[k])

            return jax.make_array_from_callback(shape, sharding, read)

        n = len(rows)
        return Split(field(0, n, length), field(1, n, length), field(2, n))


def report(number: int, value: jax.Array) -> float:
    """Prints the loss of a step (in process 0) and returns it."""
    loss = float(value)
    if jax.process_index() == 0:
        print(f"step {number} loss {loss:.9g}", flush=True)
    return loss
