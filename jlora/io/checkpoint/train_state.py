"""The state that a training run keeps beside its adapter: a tree of arrays and plain values, stored by name."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp

from jlora._tree.paths import is_array, named_leaves
from jlora.io.checkpoint.errors import CheckpointError
from jlora.io.checkpoint.placement import Placement, placement_of

_PLAIN = (bool, int, float, str)


def split(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a state into its arrays, by their names in the checkpoint, and a JSON description of its leaves.

    Raises:
        TypeError: if a leaf is not an array, a number, a string or a boolean.
    """
    arrays, leaves = {}, {}
    for path, leaf in named_leaves(state):
        if is_array(leaf):
            name = f"state::{quote(path, safe='')}"
            arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
            leaves[path] = {"array": name, "shape": leaf.shape, "dtype": leaf.dtype.name}
            if _is_key(leaf):
                leaves[path]["impl"] = str(jax.random.key_impl(leaf))
        elif isinstance(leaf, _PLAIN):
            leaves[path] = {"value": leaf}
        else:
            raise TypeError(
                f"The state's leaf {path!r} has type {type(leaf).__name__}, which cannot be saved: make it an array, "
                "a number, a string or a boolean."
            )
    return arrays, leaves


def placements(leaves: Mapping[str, Any], like: Any) -> dict[str, Placement]:
    """Returns the placement of every array of a saved state, by its name in the checkpoint.

    Arguments:
        leaves: the description that `split` returned.
        like: the tree that the state has to fit.

    Raises:
        CheckpointError: if the tree has other leaves, shapes, dtypes or types; lists every difference.
    """
    expected = dict(named_leaves(like))
    differences = [f"{path}: saved, but not in the tree" for path in leaves if path not in expected]
    out: dict[str, Placement] = {}
    for path, leaf in expected.items():
        if path not in leaves:
            differences.append(f"{path}: in the tree, but not saved")
            continue
        entry = leaves[path]
        saved = f"{entry['dtype']}{tuple(entry['shape'])}" if "array" in entry else type(entry["value"]).__name__
        given = f"{leaf.dtype.name}{leaf.shape}" if is_array(leaf) else type(leaf).__name__
        if saved != given:
            differences.append(f"{path}: saved as {saved}, in the tree {given}")
        elif is_array(leaf):
            out[entry["array"]] = placement_of(leaf)
    if differences:
        raise CheckpointError(
            "The saved state does not fit this tree. Pass a tree of the structure, shapes and dtypes that were saved."
            "\n  " + "\n  ".join(differences)
        )
    return out


def join(leaves: Mapping[str, Any], arrays: Mapping[str, Any], like: Any) -> Any:
    """Rebuilds a state: the inverse of `split`, with the tree structure of `like`."""
    values = []
    for path, _ in named_leaves(like):
        entry = leaves[path]
        value = entry["value"] if "value" in entry else arrays[entry["array"]]
        values.append(jax.random.wrap_key_data(value, impl=entry["impl"]) if "impl" in entry else value)
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
