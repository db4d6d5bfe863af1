"""One of two processes that share a mesh, save and load: a program for `tests/devices/test_shardings.py`.

    python -m tests.support.processes FOLDER PORT RANK

Prints as JSON which chunks it removed from its copy of the checkpoint, and the error for one chunk too many.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def main() -> None:
    folder, port, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
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
    jlora.save(folder / "saved", adapter, params=params)
    compare(jlora.load(folder / "saved", params=params), {"a": a, "b": b})

    handlers = {"arrays": ocp.PyTreeCheckpointHandler(use_ocdbt=False), "jlora": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(folder / "files", args=ocp.args.Composite(**jlora.checkpoint_args(adapter, params=params)))
    shutil.copytree(folder / "files", folder / f"files_{rank}")
    chunks = folder / f"files_{rank}" / "arrays" / "w:factors:a"
    rows = json.loads((chunks / ".zarray").read_text())["chunks"][0]
    shards = [shard.index[0] for shard in adapter["w"].factors["a"].addressable_shards]
    needed = {f"{start // rows}.0" for shard in shards for start in range(shard.start, shard.stop, rows)}
    removed = sorted({f"{k}.0" for k in range(len(a) // rows)} - needed)
    for name in removed:
        (chunks / name).unlink()
    compare(jlora.load(folder / f"files_{rank}", params=params), {"a": a, "b": b})
    (chunks / min(needed)).unlink()
    try:
        jlora.load(folder / f"files_{rank}", params=params)
        refused = ""
    except jlora.CheckpointError as error:
        refused = str(error)
    print(json.dumps({"removed": removed, "refused": refused}))


def compare(adapter: dict, expected: dict[str, np.ndarray]) -> None:
    """Raises if a shard of this process has other values than expected."""
    for name, values in expected.items():
        for shard in adapter["w"].factors[name].addressable_shards:
            assert np.array_equal(shard.data, values[shard.index])


if __name__ == "__main__":
    main()
