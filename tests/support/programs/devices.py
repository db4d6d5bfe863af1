"""Programs on many devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from tests.support import weight_uses
from tests.support.programs.program import Tree, Use, program
from tests.support.programs.trees import bend, layer, pair, plus


def _shard_map(fun: Callable[..., Any], specs: Any, out: PartitionSpec, **options: Any) -> Callable[..., Any]:
    return jax.shard_map(fun, mesh=weight_uses.mesh(), in_specs=specs, out_specs=out, **options)


@program()
def shard_map(use: Use) -> Use:
    """Weights on every device, inputs divided over two."""
    specs = (PartitionSpec(), PartitionSpec("model"))
    inner = _shard_map(lambda p, x: _lead(use(p, layer(x, 0))), specs, PartitionSpec("model"))
    return lambda p, x: inner(p, pair(x))


@program(copies=2)
def shard_map_of_cut_weights(use: Use) -> Use:
    """Each device has one layer and one part of the inputs."""
    specs = (PartitionSpec("model"), PartitionSpec("model"))
    inner = _shard_map(lambda p, x: _lead(use(layer(p, 0), layer(x, 0))), specs, PartitionSpec("model"))
    return lambda p, x: inner(p, pair(x))


@program(copies=2)
def shard_map_of_gathered_weights(use: Use) -> Use:
    """Each device holds a part of each weight, and gathers all parts before the use."""

    def local(p: Tree, x: Tree) -> Tree:
        gathered = jax.tree.map(lambda a: lax.all_gather(a, "model", tiled=True), p)
        return plus(use(layer(gathered, 0), x), bend(use(layer(gathered, 1), x)))

    specs = (PartitionSpec("model"), PartitionSpec())
    return _shard_map(local, specs, PartitionSpec(), check_vma=False)


@program(copies=2)
def shard_map_of_one_axis(use: Use) -> Use:
    """The other axis of the mesh is left to the compiler."""
    specs = (PartitionSpec("model"), PartitionSpec("model"))
    inner = _shard_map(
        lambda p, x: _lead(bend(use(layer(p, 0), layer(x, 0)))), specs, PartitionSpec("model"), axis_names={"model"}
    )
    return lambda p, x: jax.jit(inner)(p, pair(x))


def _lead(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: a[None], tree)
