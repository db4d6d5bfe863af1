"""mlorax: the whole program, on parameters that each call merges."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._peers import layered, tries
from benchmarks._peers.tries import Attempt, Tree
from tests.support.programs import Program
from tests.support.weight_uses import Kind

mlorax: Any = importlib.import_module("mlorax")


def attempt(kind: Kind, program: Program, params: Tree, x: Tree) -> Attempt:
    fun = program.build(kind.use)
    # A rule is a part of a name: the sign at its end makes it the whole name.
    spec = mlorax.LoRASpec(rank=tries.RANK, alpha=tries.ALPHA, rules=[f"{name}|" for name in kind.weights])

    def init(params: Tree) -> Any:
        def run(params: Tree, inputs: Tree) -> Tree:
            return fun({name.rstrip("|"): w for name, w in params.items()}, inputs)

        arrays = {f"{name}|": jnp.asarray(w) for name, w in params.items()}
        return mlorax.lora_init(spec, None, params=arrays, apply_fn=run)

    def side(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return init(params)[1](adapter, inputs=x)

    def change(adapter: Tree) -> dict[str, jax.Array]:
        scale = tries.ALPHA / tries.RANK
        pairs = {name.rstrip("|"): value["$lora$"] for name, value in adapter.items()}
        return {name: scale * layered.product("xz,zy->xy", f["a"], f["b"]) for name, f in pairs.items()}

    return Attempt(side, jax.eval_shape(lambda p: init(p)[0], params), change)


if __name__ == "__main__":
    tries.main(attempt, "mlorax", "flax")
