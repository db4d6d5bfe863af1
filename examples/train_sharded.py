"""Fine-tunes on a mesh: weights, factors, optimiser state and batches are sharded (FSDP x tensor parallelism).

python examples/train_sharded.py --mesh 4x2 --devices 8     # on eight simulated devices
python examples/train_sharded.py --mesh 1x1 --tiny          # on one, without a download

The step is that of one device, compiled for the mesh: `jlora.shardings` gives the shardings of the factors, and the
compiler inserts the collectives. A mesh that does not fit the weights is an error before anything is computed.
"""

from __future__ import annotations

import argparse
import sys

import assets
import devices


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = devices.arguments(__doc__)
    parser.add_argument("--mesh", default="1x1", help="devices along data x model, such as 4x2 (default: 1x1)")
    return parser.parse_args(args)


def train(options: argparse.Namespace) -> list[float]:
    """Trains; returns the loss of every step."""
    devices.simulate(options.devices)
    mesh = devices.mesh(options.mesh)
    job = devices.job(options)
    layout = devices.Layout.of(job, mesh, options.batch, options.accumulate)
    variables, trainable, state = layout.start(job)
    step = layout.step(job, options.accumulate, trainable, state)
    losses = []
    for number, rows in zip(range(1, options.steps + 1), devices.batches(job, options), strict=False):
        trainable, state, value = step(trainable, state, variables, *layout.batch(job.train, *rows))
        losses.append(devices.report(number, value))
    return losses


if __name__ == "__main__":
    try:
        train(arguments())
    except (devices.LayoutError, assets.AssetError) as error:
        sys.exit(f"error: {error}")
