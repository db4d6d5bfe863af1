"""What base an adapter was made for, and whether another is the same."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._tree.leaves import is_quantized
from jlora._tree.paths import closest_matches, is_array, named_leaves


def fingerprint(params: Any, hashes: bool) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every parameter, and on request the SHA-256 sum of its bytes."""
    leaves = {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}
    return {
        path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        | ({"sha256": _sha256(path, leaf)} if hashes else {})
        for path, leaf in leaves.items()
    }


def misfits(recorded: Mapping[str, Mapping[str, Any]], params: Any, *, whole: bool) -> list[str]:
    """One line for every parameter that differs from what was recorded.

    Arguments:
        recorded: by path, what to compare: shape, dtype, sha256. A sum is compared where the leaf has values.
        params: the base.
        whole: whether `recorded` names all parameters, so that one more is a misfit.
    """
    leaves = {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}
    out = []
    for path, said in recorded.items():
        if path not in leaves:
            out.append(f"{path}: no such parameter ({closest_matches(path, leaves)})")
            continue
        leaf = leaves[path]
        found: dict[str, Any] = {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        wrong = [f"{k} {said[k]}, found {v}" for k, v in found.items() if k in said and said[k] != v]
        if not wrong and "sha256" in said and not isinstance(leaf, jax.ShapeDtypeStruct):
            wrong = [] if _sha256(path, leaf) == said["sha256"] else ["other values, found these"]
        out += [f"{path}: made for {line}" for line in wrong]
    if whole:
        out += [f"{path}: a parameter that the base did not have" for path in leaves if path not in recorded]
    return out


def _sha256(path: str, leaf: Any) -> str:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"{path} has no values to hash: pass the parameters themselves, or leave out hashes.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"{path} lies on several processes, and hashing would gather it: leave out hashes.")
    if is_quantized(leaf):
        return hashlib.sha256("".join(_sha256(path, part) for part in jax.tree.leaves(leaf)).encode()).hexdigest()
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return hashlib.sha256(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data).hexdigest()
