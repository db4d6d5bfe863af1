"""quax: the whole program, quaxified, on the `LoraArray` of its examples; what has no rule there is materialised."""

import importlib
from typing import Any

import jax

from benchmarks._peers import layered, tries
from benchmarks._peers.tries import Attempt, Tree
from tests.support.programs import Program
from tests.support.weight_uses import Kind

quax: Any = importlib.import_module("quax")
LoraArray: Any = importlib.import_module("quax.examples.lora").LoraArray


def is_lora(node: Any) -> bool:
    return isinstance(node, LoraArray)


def attempt(kind: Kind, program: Program, params: Tree, x: Tree) -> Attempt:
    run = quax.quaxify(program.build(kind.use))

    def wrap(name: str, w: Any) -> Any:
        return LoraArray(w, rank=tries.RANK, allow_materialise=True, key=jax.random.key(0))

    def factors(name: str, w: Any) -> dict[str, jax.Array]:
        return {"a": wrap(name, w).a, "b": wrap(name, w).b}

    def replaced(name: str, w: Any, pair: dict[str, jax.Array]) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: pair.get(path[-1].name, leaf), wrap(name, w))

    def side(params: Tree, adapter: Tree, x: Tree) -> Tree:
        own = {name: replaced(name, params[name], pair) for name, pair in adapter.items()}
        out = run({**params, **own}, x)
        return jax.tree.map(lambda node: node.materialise() if is_lora(node) else node, out, is_leaf=is_lora)

    def change(adapter: Tree) -> dict[str, jax.Array]:
        return {name: layered.product("...xz,...zy->...xy", f["a"], f["b"]) for name, f in adapter.items()}

    adapter = {name: jax.eval_shape(lambda w, n=name: factors(n, w), params[name]) for name in kind.weights}
    return Attempt(side, adapter, change)


if __name__ == "__main__":
    tries.main(attempt, "quax", "equinox")
