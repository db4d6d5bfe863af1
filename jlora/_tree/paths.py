"""Names of parameters: one path a leaf, the same for every library."""

import collections
import difflib
import sys
from collections.abc import Iterable
from typing import Any

import jax

from jlora._tree.leaves import is_quantized

Tree = Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or stands for one (`jax.ShapeDtypeStruct`); a Python number is not."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """`jax.tree.flatten` with quantised weights as leaves."""
    return jax.tree.flatten(tree, is_leaf=is_quantized)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf with its path, in the order of `flatten`.

    An `nnx.Variable` counts as a leaf, so its path has no trailing `/value`, and so does a quantised weight. Two
    leaves of one path raise.
    """
    out = []
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf):
        path = _spell(keys)
        inner = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_quantized)
        if len(inner) == 1:
            out.append((path, inner[0][1]))
        else:
            out += [("/".join(filter(None, (path, _spell(more)))), leaf) for more, leaf in inner]
    twice = [path for path, count in collections.Counter(path for path, _ in out).items() if count > 1]
    if twice:
        raise ValueError(f"Several parameters have the path {twice[0]!r}: rename a key that contains '/'.")
    return out


def _spell(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_leaf(node: Any) -> bool:
    if is_quantized(node):
        return True
    nnx = sys.modules.get("flax.nnx")  # a program without NNX has no Variable
    return nnx is not None and isinstance(node, nnx.Variable)


def closest_matches(path: str, known: Iterable[str]) -> str:
    """A phrase with the known paths that look most like one that is not there."""
    known = list(known)
    close = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or known[:3]
    return f"near misses: {', '.join(close)}" if close else "there are none at all"
