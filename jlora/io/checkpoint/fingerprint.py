"""Which base an adapter was trained on, and how another base differs from it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._tree.leaves import is_quantized
from jlora._tree.paths import closest_matches, is_array, named_leaves


def fingerprint(params: Any, hashes: bool) -> dict[str, dict[str, Any]]:
    """Returns shape and dtype of every parameter, by path.

    Arguments:
        params: the base parameters.
        hashes: adds the SHA-256 of the values of every parameter.

    Raises:
        ValueError: if a parameter is to be hashed and has no values, or has them on several processes.
    """
    return {
        path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        | ({"sha256": _sha256(path, leaf)} if hashes else {})
        for path, leaf in _arrays(params).items()
    }


def differences(recorded: Mapping[str, Mapping[str, Any]], params: Any, *, complete: bool) -> list[str]:
    """Returns one line for every parameter that differs from what was recorded.

    Arguments:
        recorded: by path, what to compare: shape, dtype, sha256. A hash is compared if the parameter has values.
        params: the base parameters.
        complete: whether `recorded` has all parameters, so that an additional one is a difference.
    """
    leaves = _arrays(params)
    lines = []
    for path, expected in recorded.items():
        if path in leaves:
            lines += [f"{path}: {line}" for line in _leaf_differences(path, expected, leaves[path])]
        else:
            lines.append(f"{path}: no such parameter ({closest_matches(path, leaves)})")
    if complete:
        lines += [f"{path}: a parameter that the base did not have" for path in leaves if path not in recorded]
    return lines


def _leaf_differences(path: str, expected: Mapping[str, Any], leaf: Any) -> list[str]:
    actual: dict[str, Any] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
    lines = [
        f"made for {field} {expected[field]}, found {value}"
        for field, value in actual.items()
        if field in expected and expected[field] != value
    ]
    has_values = not isinstance(leaf, jax.ShapeDtypeStruct)
    if not lines and "sha256" in expected and has_values and _sha256(path, leaf) != expected["sha256"]:
        lines.append("base values differ from those recorded")
    return lines


def _arrays(params: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}


def _sha256(path: str, leaf: Any) -> str:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"{path} has no values to hash: pass the parameters themselves, or leave out hashes.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"{path} is placed on several processes, and hashing it would gather it on one: leave out hashes."
        )
    if is_quantized(leaf):
        return hashlib.sha256("".join(_sha256(path, part) for part in jax.tree.leaves(leaf)).encode()).hexdigest()
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return hashlib.sha256(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data).hexdigest()
