"""Fine-tunes on several devices with `jax.pmap`: replicas of the parameters, and averaged gradients.

python examples/train_pmap.py --devices 8            # on eight simulated devices
python examples/train_pmap.py --devices 2 --tiny     # on two, without a download
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax

import assets
import devices
import training


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    return devices.arguments(__doc__).parse_args(args)


def train(options: argparse.Namespace) -> list[float]:
    """Trains; returns the loss of every step."""
    devices.simulate(options.devices)
    count = jax.local_device_count()
    if options.batch % (count * options.accumulate):
        raise devices.LayoutError(
            f"{count} devices with --accumulate {options.accumulate} do not divide --batch {options.batch}."
        )
    job = devices.job(options)

    def replicas(tree: Any) -> Any:
        """A copy of the tree on every device, with a first axis for the devices."""
        return jax.pmap(lambda _, tree: tree, in_axes=(0, None))(jax.numpy.arange(count), tree)

    start = {"adapter": job.init(), "head": job.head}
    trainable, state, variables = map(replicas, (start, job.optimiser.init(start), job.variables))
    step = jax.pmap(devices.step(job, options.accumulate, axis="batch"), axis_name="batch", donate_argnums=(0, 1))
    losses = []
    for number, rows in zip(range(1, options.steps + 1), devices.batches(job, options), strict=False):
        parts = (a.reshape(count, -1, *a.shape[1:]) for a in training.cut(job.train, *rows))
        trainable, state, values = step(trainable, state, variables, *parts)
        losses.append(devices.report(number, values[0]))
    return losses


if __name__ == "__main__":
    try:
        train(arguments())
    except (devices.LayoutError, assets.AssetError) as error:
        sys.exit(f"error: {error}")
