"""Compares the two sides of the law on a random program, in units of what roundings change."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.agreement import F32

Tree = Any


@dataclasses.dataclass(frozen=True)
class Results:
    """Values and derivatives of a program: adapted, merged, and merged with noise; and the base's values.

    Arguments:
        eps: the coarsest rounding of an activation.
        storage: the coarsest rounding of a parameter.
        adapted, merged: of the two sides of the law.
        base: the values of the base program.
        near: as `merged`, of parameters, adapters and inputs that are off by a rounding.
    """

    eps: float
    storage: float
    adapted: Tree
    merged: Tree
    base: Tree
    near: list[Tree]


def compare(results: Results) -> tuple[str, str]:
    """The outcome, as of `Verdict`, and the text of a fault."""
    trees = results.adapted, results.merged, *results.near
    leaves = [(name, arrays) for name, *arrays in _aligned(trees) if jnp.issubdtype(arrays[1].dtype, jnp.floating)]
    if any(_finite_places_differ(want, near) for _, (_, want, *others) in leaves for near in others):
        return "coarse", ""  # an overflow
    top = max((_largest(want) for _, (_, want, *_) in leaves), default=0.0)
    bounds = {name: _bound(results, name, want, others, top) for name, (_, want, *others) in leaves}
    for name, (adapted, want, *_) in leaves:
        fault = _fault(adapted, want, bounds[name])
        if fault:
            is_narrow = max(results.eps, results.storage) > 2**-12
            overflows = is_narrow and _finite_places_differ(adapted, want) and max(map(_largest, (adapted, want))) > 200
            return ("coarse", "") if overflows else ("fault", f"{name}: {fault}")
    effects = zip(jax.tree.leaves(results.merged["value"]), jax.tree.leaves(results.base), strict=True)
    effect = max(_gap(want, base) for want, base in effects)
    noise = max(bound for name, bound in bounds.items() if "value" in name)
    unclear = any(bounds[name] > 0.5 * _largest(want) > 0 for name, (_, want, *_) in leaves)
    return ("coarse" if unclear or noise > 0.5 * effect else "agrees"), ""


def _fault(adapted: Any, want: Any, bound: float) -> str:
    """How a leaf disagrees; empty if it agrees."""
    if (adapted.shape, adapted.dtype) != (want.shape, want.dtype):
        return f"{adapted.dtype}{adapted.shape} adapted, {want.dtype}{want.shape} merged"
    if _finite_places_differ(adapted, want):
        return "not finite in other places"
    gap = _gap(adapted, want)
    return "" if gap <= bound else f"differs by {gap:.3g}, largest entry {_largest(want):.3g}, bound {bound:.3g}"


def _bound(results: Results, name: str, want: Any, near: list[Any], top: float) -> float:
    """What a leaf may differ by: roundings of its own largest entry and of the tree's, and what noise changes.

    A merged weight of 8 bits has cotangents of 8 bits, which are summed as such.
    """
    loose = 4 if results.storage > 2**-5 and "value" not in name else 1
    relative = max(F32, 8 * results.eps, 2 * results.storage)
    moved = max(_gap(want, other) for other in near)
    return loose * (relative * _largest(want) + 4 * moved + 2 * results.eps * top)


def _aligned(trees: tuple[Tree, ...]) -> list[tuple[Any, ...]]:
    """The name and the leaves of each place in trees of one structure."""
    named = jax.tree_util.tree_leaves_with_path(trees[0])
    columns = [jax.tree.leaves(tree) for tree in trees]
    names = [jax.tree_util.keystr(path) for path, _ in named]
    return list(zip(names, *columns, strict=True))


def _finite_places_differ(a: Any, b: Any) -> bool:
    return bool((np.isfinite(_double(a)) != np.isfinite(_double(b))).any())


def _double(a: Any) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def _gap(a: Any, b: Any) -> float:
    a, b = _double(a), _double(b)
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(np.where(both, a, 0) - np.where(both, b, 0)).max(initial=0))


def _largest(a: Any) -> float:
    return _gap(a, np.zeros(()))
