"""All that a training run has beside its adapter: a tree of arrays and plain values, by name."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from jlora._tree.paths import is_array, named_leaves
from jlora.io.checkpoint.errors import CheckpointError
from jlora.io.checkpoint.reader import HOST, Place

_PLAIN = (bool, int, float, str)


def split(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree's arrays by their names in the checkpoint, and what JSON says of its leaves.

    Raises:
        TypeError: where a leaf is neither an array nor a number, string or boolean.
    """
    arrays, leaves = {}, {}
    for path, leaf in named_leaves(state):
        if is_array(leaf):
            key = f"state::{quote(path, safe='')}"
            arrays[key] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
            leaves[path] = {"array": key, "shape": leaf.shape, "dtype": leaf.dtype.name}
            if _is_key(leaf):
                leaves[path]["impl"] = str(jax.random.key_impl(leaf))
        elif isinstance(leaf, _PLAIN):
            leaves[path] = {"value": leaf}
        else:
            raise TypeError(
                f"The state's leaf {path!r} is {type(leaf).__name__}: make it an array, a number or a string."
            )
    return arrays, leaves


def places(leaves: Mapping[str, Any], like: Any) -> dict[str, Place]:
    """Where each array of a state belongs, from the tree that it has to look like.

    Raises:
        CheckpointError: where the tree has other leaves, shapes, dtypes or types, with every misfit.
    """
    wanted = dict(named_leaves(like))
    wrong = [f"{path}: saved, and not in the tree" for path in leaves if path not in wanted]
    out: dict[str, Place] = {}
    for path, leaf in wanted.items():
        said = leaves.get(path)
        if said is None:
            wrong.append(f"{path}: in the tree, and not saved")
            continue
        saved = f"{said['dtype']}{tuple(said['shape'])}" if "array" in said else type(said["value"]).__name__
        found = f"{leaf.dtype.name}{leaf.shape}" if is_array(leaf) else type(leaf).__name__
        if saved != found:
            wrong.append(f"{path}: saved as {saved}, in the tree {found}")
        elif is_array(leaf):
            out[said["array"]] = place(leaf)
    if wrong:
        raise CheckpointError("The saved state does not fit this tree:\n  " + "\n  ".join(wrong))
    return out


def join(leaves: Mapping[str, Any], arrays: Mapping[str, Any], like: Any) -> Any:
    """The tree again."""
    found = []
    for path, _ in named_leaves(like):
        said = leaves[path]
        value = said["value"] if "value" in said else arrays[said["array"]]
        found.append(jax.random.wrap_key_data(value, impl=said["impl"]) if "impl" in said else value)
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def place(leaf: Any) -> Place:
    """Where a leaf lies: an array that was put nowhere in particular is put nowhere in particular again."""
    if isinstance(leaf, np.ndarray | np.generic):
        return HOST
    if _is_key(leaf) or (isinstance(leaf, jax.Array) and not leaf.committed):
        return None
    return getattr(leaf, "sharding", None)
