"""Paths of parameters: one for each leaf, in the same form for every library."""

import collections
import difflib
import hashlib
import sys
from collections.abc import Iterable
from typing import Any

import jax

from jlora._tree.leaves import is_quantized

Tree = Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: an array or a `jax.ShapeDtypeStruct`, not a Python number."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """`jax.tree.flatten` with quantised weights as leaves."""
    return jax.tree.flatten(tree, is_leaf=is_quantized)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf with its path, in the order of `flatten`.

    An `nnx.Variable` counts as a leaf, so its path has no trailing `/value`, and so does a quantised weight.

    Raises:
        ValueError: if two leaves have the same path.
    """
    out = []
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf):
        path = _path(keys)
        inner = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_quantized)
        if len(inner) == 1:
            out.append((path, inner[0][1]))
        else:
            out += [("/".join(filter(None, (path, _path(more)))), leaf) for more, leaf in inner]
    repeated = [path for path, count in collections.Counter(path for path, _ in out).items() if count > 1]
    if repeated:
        raise ValueError(f"Several parameters have the path {repeated[0]!r}: rename a key that contains '/'.")
    return out


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_leaf(node: Any) -> bool:
    if is_quantized(node):
        return True
    nnx = sys.modules.get("flax.nnx")  # a program that has not imported NNX has no Variable
    return nnx is not None and isinstance(node, nnx.Variable)


def closest_matches(path: str, candidates: Iterable[str]) -> str:
    """A phrase for errors with those of the candidates that are most similar to a path that is not among them."""
    candidates = list(candidates)
    close = difflib.get_close_matches(path, candidates, n=3, cutoff=0.4) or candidates[:3]
    return f"near misses: {', '.join(close)}" if close else "there are none"


def path_number(path: str) -> int:
    """A number that depends on a path alone, to be folded into PRNG keys."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")


def check_state(params: Tree) -> None:
    """Raises if the parameters are a Flax NNX module with state that a call updates, which would be lost.

    Raises:
        ValueError: with the paths of the state, and what to do.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return
    kept = (nnx.Param, nnx.LoRAParam)
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    state = [_path(keys) for keys, node in nodes if isinstance(node, nnx.Variable) and not isinstance(node, kept)]
    if state:
        raise ValueError(
            f"The nnx module has state that a call updates, such as {state[0]}; the update would be lost. Split the "
            "module, graphdef, params, state = nnx.split(model, nnx.Param, ...), and adapt a function of params and "
            "state that merges them, calls the model, and returns nnx.state(model, nnx.Not(nnx.Param)) too."
        )
