"""Trains an adapter with checkpoints, and continues exactly from the last one after it was stopped or killed.

python examples/resume.py --folder runs/resume                # stop it with Ctrl-C or kill -9, and start again
python examples/resume.py --folder runs/resume --steps 400    # or let it end, and train longer

The task is synthetic and needs no download: a network with LoRA and dropout learns the outputs of another network of
the same shape. Every few steps Orbax's CheckpointManager writes the state of the run in the background: adapter,
optimiser state, step, and position in the data. Two runs of the same number of steps end in the same bits,
however often one of them was stopped. With several devices
(`XLA_FLAGS=--xla_force_host_platform_device_count=8` simulates eight on a CPU) base, factors and batches are sharded.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import checkpoint_managers as policies

import jlora

ROWS, WIDTH, HIDDEN, BATCH = 512, 16, 64, 32


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/resume"), help="of the checkpoints (default: runs/resume)"
    )
    parser.add_argument("--steps", type=int, default=200, help="in total, with those of earlier runs (default: 200)")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints (default: 10)")
    parser.add_argument("--devices", type=int, help="number of devices to use (default: all)")
    return parser.parse_args()


def model(params: Any, x: Any) -> jax.Array:
    """A residual network: x `(batch, width)` -> `(batch, width)`."""
    for layer in params["layers"]:
        x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
    return x


def pretrained(key: jax.Array, mesh: Mesh) -> Any:
    """The base, with its hidden axis sharded over the mesh."""

    def layer(key: jax.Array) -> dict[str, jax.Array]:
        up, down = jax.random.split(key)
        return {
            "up": jax.device_put(jax.random.normal(up, (WIDTH, HIDDEN)) / 4, NamedSharding(mesh, P(None, "model"))),
            "down": jax.device_put(jax.random.normal(down, (HIDDEN, WIDTH)) / 8, NamedSharding(mesh, P("model"))),
        }

    return {"layers": [layer(k) for k in jax.random.split(key, 2)]}


def draw(data: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows of the next batch, and the position after it; every epoch has another order."""
    rng = np.random.default_rng()
    rng.bit_generator.state = data["rng"]
    order, position = data["order"], data["position"]
    if position + BATCH > ROWS:
        order, position = rng.permutation(ROWS), 0
    following = {"rng": rng.bit_generator.state, "order": order, "position": position + BATCH}
    return order[position : position + BATCH], following


def start(adapter: Any, tx: optax.GradientTransformation) -> dict[str, Any]:
    """The state of a run beside its adapter, before the first step."""
    rng = np.random.default_rng(0)
    data = {"rng": rng.bit_generator.state, "order": np.arange(ROWS), "position": ROWS}
    return {"optimiser": tx.init(adapter), "step": 0, "data": data}


def manager(folder: Path) -> ocp.CheckpointManager:
    """A checkpoint manager that saves in the background and keeps the latest two checkpoints and the best one."""

    def loss(metrics: Any) -> float:
        return metrics["loss"]

    keep = policies.AnyPreservationPolicy([policies.LatestN(2), policies.BestN(get_metric_fn=loss, reverse=True, n=1)])
    options = ocp.CheckpointManagerOptions(best_fn=loss, best_mode="min", preservation_policy=keep)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def train(folder: Path, steps: int, every: int, count: int) -> tuple[Any, dict[str, Any], list[float]]:
    """Trains on `count` devices until step `steps`, from the latest checkpoint in the folder if there is one.

    Returns the adapter, the state beside it, and the losses of the steps that this call ran.
    """
    shape = (count // 2 or 1, min(2, count))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "model"))
    base_key, teacher_key, adapter_key, dropout_key = jax.random.split(jax.random.key(0), 4)
    params = pretrained(base_key, mesh)
    x = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
    y = np.asarray(model(pretrained(teacher_key, mesh), x))
    adapted = jlora.adapt(model)
    tx = optax.adamw(3e-3)

    def loss(adapter: Any, params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(adapted(params, jlora.with_dropout(adapter, key), x) - y).mean()

    @jax.jit
    def step(adapter: Any, state: Any, params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(adapter, params, key, x, y)
        updates, state = tx.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    losses = []
    with manager(folder) as checkpoints:
        sites = jlora.trace(model, params, x[:1])
        adapter = jlora.init(adapter_key, sites, jlora.LoRA(rank=4, dropout=0.1))
        adapter = jax.device_put(adapter, jlora.shardings(adapter, params))
        state = start(adapter, tx)
        latest = checkpoints.latest_step()
        if latest is not None:
            adapter = jlora.load(folder / str(latest), params=params)
            state = jlora.load_state(folder / str(latest), state)
            print(f"continuing after step {latest}", flush=True)

        for number in itertools.count(state["step"] + 1):
            if number > steps:
                break
            rows, data = draw(state["data"])
            batch = jax.device_put((x[rows], y[rows]), NamedSharding(mesh, P("data")))
            key = jax.random.fold_in(dropout_key, number)  # derived from the step, so that no key has to be saved
            adapter, optimiser, value = step(adapter, state["optimiser"], params, key, *batch)
            state = {"optimiser": optimiser, "step": number, "data": data}
            losses.append(float(value))
            print(f"step {number} loss {losses[-1]:.4f}", flush=True)
            if number % every == 0 or number == steps:
                items = jlora.checkpoint_args(adapter, state, params=params)
                checkpoints.save(number, args=ocp.args.Composite(**items), metrics={"loss": losses[-1]})
    return adapter, state, losses


def main() -> int:
    """Trains with the options of the command line."""
    options = arguments()
    try:
        train(options.folder, options.steps, options.every, options.devices or len(jax.devices()))
    except jlora.CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
