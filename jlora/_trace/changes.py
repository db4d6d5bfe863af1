"""What a program changes in its arguments: modules of Flax NNX are objects, so a call can change them."""

import sys
from collections.abc import Sequence
from typing import Any

import jax

from jlora._compat import Jaxpr, bodies, is_literal
from jlora._tree.paths import flatten, named_leaves

_WITH_THE_OPERANDS_OF_ITS_BODY = ("jit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")


class Modules:
    """The modules among the arguments of a program, as they are before it runs.

    Arguments:
        arguments: a tree.
    """

    def __init__(self, arguments: Any) -> None:
        nnx = sys.modules.get("flax.nnx")
        nodes = [] if nnx is None else jax.tree.leaves(arguments, is_leaf=lambda n: isinstance(n, nnx.Pytree))
        self._modules = [(node, *flatten(node)) for node in nodes if nnx and isinstance(node, nnx.Pytree)]

    def changes(self, out: Any) -> list[tuple[str, Any, Any]]:
        """The arrays that are others after the call and that it does not return: their paths, before and after it.

        Arguments:
            out: what the program returns.

        Raises:
            ValueError: if the modules have other attributes after the call, which it does not return.
        """
        returned, changes = {id(leaf) for leaf in jax.tree.leaves(out)}, []
        for module, leaves, structure in self._modules:
            named, before = named_leaves(module), {id(leaf) for leaf in leaves}
            if flatten(module)[1] == structure:
                pairs = zip(named, leaves, strict=True)
                changes += [(p, old, new) for (p, new), old in pairs if new is not old and id(new) not in returned]
                continue
            new = {path: id(leaf) for path, leaf in named if id(leaf) not in before}
            if not new or not returned.issuperset(new.values()):
                raise lost([*new, "its attributes"])
        return changes


def lost(paths: Sequence[str]) -> ValueError:
    """The error for state of a module that a program changes and does not return."""
    return ValueError(
        f"The call changes {paths[0]} of an nnx module among its arguments, and the change would be lost. Adapt the "
        "module itself: jlora.nnx.adapt(model, targets, x, rngs=nnx.Rngs(0)) returns a module that keeps its state. Or "
        "return what changes: a function of (params, state, x), from nnx.split(model, nnx.Param, ...), that returns "
        "nnx.state(model, nnx.Not(nnx.Param)) too."
    )


def inputs_returned(jaxpr: Jaxpr) -> list[Any]:
    """For each output of a program the input that it is; None if it is computed."""
    source: dict[Any, Any] = {var: var for var in jaxpr.invars}
    for eqn in jaxpr.eqns:
        inner = bodies(eqn) if eqn.primitive.name in _WITH_THE_OPERANDS_OF_ITS_BODY else []
        for body, _ in inner[:1]:
            operands = dict(zip(body.invars, eqn.invars, strict=True))
            returned = zip(eqn.outvars, inputs_returned(body), strict=True)
            origins = {out: operands[var] for out, var in returned if var is not None}
            source |= {out: source.get(atom) for out, atom in origins.items() if not is_literal(atom)}
    return [None if is_literal(atom) else source.get(atom) for atom in jaxpr.outvars]
