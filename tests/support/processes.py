"""One of two processes that share a mesh, save and load: a program for `tests/devices/test_shardings.py`.

    python -m tests.support.processes FOLDER PORT RANK

Prints, as JSON, which pieces of which arrays it read.
"""

from __future__ import annotations

import json
import socket
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.io.checkpoint import reader as _arrays


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def main() -> None:
    folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))

    def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    rng = np.random.default_rng(0)
    weight, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 24), (16, 2), (2, 24)))
    params = {"w": put(weight, NamedSharding(mesh, PartitionSpec("x", "y")))}
    update = jlora.Update(factors={"a": a, "b": b}, method=jlora.LoRA(rank=2), roles=("in", "out"), shape=(16, 24))
    adapter = jax.tree.map(put, {"w": update}, jlora.shardings({"w": update}, params))
    assert not adapter["w"].factors["a"].is_fully_addressable
    jlora.save(folder, adapter, params=params)

    seen = []
    fill = _arrays._fill

    def watched(folder, files, plan, box, known):
        seen.append([plan.name, [[part.start, part.stop] for part in box]])
        return fill(folder, files, plan, box, known)

    _arrays._fill = watched
    loaded = jlora.load(folder, params=params)
    for name, expected in (("a", a), ("b", b)):
        for shard in loaded["w"].factors[name].addressable_shards:
            assert np.array_equal(shard.data, expected[shard.index])
    print(json.dumps(sorted(seen)))


if __name__ == "__main__":
    main()
