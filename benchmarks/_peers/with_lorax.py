"""lorax: the whole program, transformed by `lorax.lora`."""

import functools
import importlib
import operator
from typing import Any

import jax

from benchmarks._peers import tries
from benchmarks._peers.tries import Attempt, Tree
from tests.support.programs import Program
from tests.support.weight_uses import Kind

lorax: Any = importlib.import_module("lorax")


def is_lora(node: Any) -> bool:
    return isinstance(node, lorax.LoraWeight)


def attempt(kind: Kind, program: Program, params: Tree, x: Tree) -> Attempt:
    run = lorax.lora(program.build(kind.use))
    spec = {name: tries.RANK if name in kind.weights else lorax.LORA_FREEZE for name in params}
    init = functools.partial(lorax.init_lora, spec=spec, rng=jax.random.PRNGKey(0), alpha=tries.ALPHA)
    made = init({name: jax.numpy.asarray(w) for name, w in params.items()})

    def side(params: Tree, adapter: Tree, x: Tree) -> Tree:
        def replaced(name: str) -> Any:
            return lorax.LoraWeight(w=params[name], alpha=tries.ALPHA, **adapter[name])

        out = run({**params, **{name: replaced(name) for name in adapter}}, x)
        return jax.tree.map(lambda node: node.materialize() if is_lora(node) else node, out, is_leaf=is_lora)

    def change(adapter: Tree) -> dict[str, jax.Array]:
        scale = tries.ALPHA / tries.RANK
        return {name: scale * operator.matmul(f["b"], f["a"]) for name, f in adapter.items()}

    adapter = {n: {"a": made[n].a, "b": made[n].b} for n in kind.weights if is_lora(made[n])}
    return Attempt(side, adapter, change)


if __name__ == "__main__":
    tries.main(attempt, "jax-lorax", "qax")
