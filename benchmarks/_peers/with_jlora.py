"""jlora: the whole program, adapted."""

import string

import jax

import jlora
from benchmarks._peers import tries
from benchmarks._peers.tries import Attempt, Tree
from tests.support.programs import Program
from tests.support.weight_uses import Kind


def change(update: jlora.Update) -> jax.Array:
    """`s A B` by the roles of the weight's axes."""
    axes = dict(zip(string.ascii_lowercase, update.roles, strict=False))
    stack = "".join(letter for letter, role in axes.items() if role == "stack")
    rows = "".join(letter for letter, role in axes.items() if role in ("in", "window"))
    columns = "".join(letter for letter, role in axes.items() if role == "out")
    spec = f"{stack}{rows}Z,{stack}Z{columns}->{''.join(axes)}"
    return tries.SCALE * jax.numpy.einsum(spec, update.factors["a"], update.factors["b"], precision="highest")


def attempt(kind: Kind, program: Program, params: Tree, x: Tree) -> Attempt:
    fun = program.build(kind.use)
    targets = dict.fromkeys(kind.weights, jlora.LoRA(tries.RANK, alpha=tries.ALPHA))
    sites = jlora.trace(fun, params, x)
    adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, targets))
    side = jlora.adapt(fun, on_dense="allow")
    return Attempt(side, adapter, lambda adapter: {path: change(update) for path, update in adapter.items()})


if __name__ == "__main__":
    tries.main(attempt)
