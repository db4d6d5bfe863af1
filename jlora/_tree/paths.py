"""Paths of parameters: one for each leaf, in the same form for every library."""

import collections
import difflib
import hashlib
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax

from jlora._tree.leaves import is_quantized

Tree = Any
Keys = tuple[Any, ...]


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: an array or a `jax.ShapeDtypeStruct`, not a Python number."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """`jax.tree.flatten` with quantised weights as leaves."""
    return jax.tree.flatten(tree, is_leaf=is_quantized)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf with its path, in the order of `flatten`.

    A quantised weight is one leaf. Boxes have no part in a path: what is in an `nnx.Variable`, or in a box of Flax that
    annotates axes (`nn.Partitioned`), has the path that it would have without the box.

    Raises:
        ValueError: if two leaves have the same path.
    """
    out = [(_path(keys), leaf) for keys, leaf in _leaves(tree)]
    repeated = [path for path, count in collections.Counter(path for path, _ in out).items() if count > 1]
    if repeated:
        raise ValueError(f"Several parameters have the path {repeated[0]!r}: rename a key that contains '/'.")
    return out


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _leaves(tree: Tree) -> list[tuple[Keys, Any]]:
    """Every leaf with its keys, without those of boxes."""
    if is_quantized(tree):
        return [((), tree)]
    out = []
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda n: n is not tree and _is_special(n)):
        inner = _leaves(node) if node is not tree and _is_special(node) else [((), node)]
        out += [((*keys[_is_box(tree) :], *more), leaf) for more, leaf in inner]
    return out


def _is_special(node: Any) -> bool:
    return is_quantized(node) or _is_box(node)


def _is_box(node: Any) -> bool:
    """Whether a node holds a parameter together with what Flax notes about it."""
    for module, name in (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata")):
        if module in sys.modules and isinstance(node, getattr(sys.modules[module], name)):
            return True
    return False


def without_boxes(entries: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Entries by path, with the names that earlier releases gave to the parameters in boxes replaced.

    Arguments:
        entries: what was saved, by path.
        paths: those of the parameters now: `kernel` if the parameter was saved as `kernel/value`.
    """
    plain = {path: path.removesuffix("/value") for path in entries}
    return {plain[p] if p not in paths and plain[p] in paths else p: entry for p, entry in entries.items()}


def closest_matches(path: str, candidates: Iterable[str]) -> str:
    """A phrase for errors with those of the candidates that are most similar to a path that is not among them."""
    candidates = list(candidates)
    close = difflib.get_close_matches(path, candidates, n=3, cutoff=0.4) or candidates[:3]
    return f"near misses: {', '.join(close)}" if close else "there are none"


def path_number(path: str) -> int:
    """A number that depends on a path alone, to be folded into PRNG keys."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")
